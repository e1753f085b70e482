// The ops' schemas, once for all devices: csrc/cpu and csrc/cuda implement them, kernels/<op>/native.py calls them.
// kernels/<op>/__init__.py has the letters.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mtllm, library) {
  library.def(
      "distill_loss_forward(Tensor student_SD, Tensor teacher_TD, Tensor norm_weight_D, float eps, "
      "Tensor student_bounds_P2, Tensor student_chunks_C3, Tensor teacher_bounds_P2, Tensor teacher_chunks_C3, "
      "Tensor weight_P, Tensor? aligned_S, bool keep_error) "
      "-> (Tensor pooled_error, Tensor token_error, Tensor moments, Tensor error_PD)");
  library.def(
      "distill_loss_backward(Tensor pooled_grad, Tensor token_grad, Tensor student_SD, Tensor? partners_TD, "
      "Tensor norm_weight_D, float eps, Tensor student_bounds_P2, Tensor student_chunks_C3, Tensor weight_P, "
      "Tensor error_PD, Tensor? aligned_S) -> Tensor student_grad_SD");
  library.def(
      "rms_norm_forward(Tensor x_SD, Tensor weight_D, float eps, Tensor? residual_SD, bool rounds_once) "
      "-> (Tensor y_SD, Tensor hidden_SD, Tensor rstd_S)");
  library.def(
      "rms_norm_backward(Tensor dy_SD, Tensor? dhidden_SD, Tensor hidden_SD, Tensor weight_D, Tensor rstd_S) "
      "-> Tensor dx_SD");
  library.def(
      "rope(Tensor source_SXK, Tensor(a!) out_SXK, Tensor cos_Sk, Tensor sin_Sk, int num_rotated, bool inverse) -> ()");
  library.def("swiglu_forward(Tensor gate_up_SF, bool is_gelu) -> Tensor y_SF");
  library.def("swiglu_backward(Tensor dy_SF, Tensor gate_up_SF, bool is_gelu) -> Tensor dgate_up_SF");
}
