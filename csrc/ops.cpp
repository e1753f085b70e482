// The ops' schemas, once for all devices: csrc/cpu and csrc/cuda implement them, kernels/<op>/native.py calls them.
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
}
