// The ops on CUDA devices as torch sees them. Scratch comes from torch's allocator, whose reuse follows the stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "distill_loss.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* optional_data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::float16;
    default:
      STD_TORCH_CHECK(false, "no such type here: ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

Side side_of(const Tensor& states, const Tensor& bounds_P2, const Tensor& chunks_C3, float* slots) {
  return {data<void>(states), data<int>(bounds_P2), data<int>(chunks_C3), static_cast<int>(chunks_C3.size(0)), slots};
}

Tensor slots_for(const Tensor& weight_P, const Tensor& states) {
  return new_empty(weight_P, {num_slots(states.size(0)), states.size(1)});
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "distill_loss: ", error); }

std::tuple<Tensor, Tensor, Tensor, Tensor> distill_loss_forward(
    const Tensor& student_SD, const Tensor& teacher_TD, const Tensor& norm_weight_D, double eps,
    const Tensor& student_bounds_P2, const Tensor& student_chunks_C3, const Tensor& teacher_bounds_P2,
    const Tensor& teacher_chunks_C3, const Tensor& weight_P, const std::optional<Tensor>& aligned_S, bool keep_error) {
  const torch::stable::accelerator::DeviceGuard guard(student_SD.get_device_index());
  const int64_t P = weight_P.size(0), D = student_SD.size(1), W = num_groups(P), C = student_chunks_C3.size(0);
  Tensor pooled_error = new_empty(weight_P, {}), token_error = new_empty(weight_P, {});
  Tensor moments = new_empty(weight_P, {4 + D}, ScalarType::Double);
  Tensor error_PD = new_empty(weight_P, {keep_error ? P : 0, D});
  Tensor student_slots = slots_for(weight_P, student_SD), teacher_slots = slots_for(weight_P, teacher_TD);
  Tensor totals_W5 = new_empty(weight_P, {W, 5}, ScalarType::Double);
  Tensor teacher_WD = new_empty(weight_P, {W, D}, ScalarType::Double);
  Tensor token_error_C = new_empty(weight_P, {C}, ScalarType::Double);
  const ForwardArguments arguments{
      type_of(student_SD), static_cast<int>(P), static_cast<int>(D),
      side_of(student_SD, student_bounds_P2, student_chunks_C3, data<float>(student_slots)),
      side_of(teacher_TD, teacher_bounds_P2, teacher_chunks_C3, data<float>(teacher_slots)),
      data<float>(norm_weight_D), data<float>(weight_P), static_cast<float>(eps), optional_data<int>(aligned_S),
      data<float>(pooled_error), data<float>(token_error), data<double>(moments),
      keep_error ? data<float>(error_PD) : nullptr, data<double>(totals_W5), data<double>(teacher_WD),
      data<double>(token_error_C)};
  check(mtllm_distill_loss_forward(&arguments, current_stream(student_SD)));
  return {pooled_error, token_error, moments, error_PD};
}

Tensor distill_loss_backward(const Tensor& pooled_grad, const Tensor& token_grad, const Tensor& student_SD,
                             const std::optional<Tensor>& partners_TD, const Tensor& norm_weight_D, double eps,
                             const Tensor& student_bounds_P2, const Tensor& student_chunks_C3, const Tensor& weight_P,
                             const Tensor& error_PD, const std::optional<Tensor>& aligned_S) {
  const torch::stable::accelerator::DeviceGuard guard(student_SD.get_device_index());
  Tensor grad_SD = torch::stable::empty_like(student_SD);
  const BackwardArguments arguments{
      type_of(student_SD), static_cast<int>(student_SD.size(1)),
      side_of(student_SD, student_bounds_P2, student_chunks_C3, nullptr), optional_data<void>(partners_TD),
      data<float>(norm_weight_D), data<float>(weight_P), static_cast<float>(eps), optional_data<int>(aligned_S),
      data<float>(error_PD), data<float>(pooled_grad), data<float>(token_grad), data<void>(grad_SD)};
  check(mtllm_distill_loss_backward(&arguments, current_stream(student_SD)));
  return grad_SD;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mtllm, CUDA, library) {
  library.impl("distill_loss_forward", TORCH_BOX(&distill_loss_forward));
  library.impl("distill_loss_backward", TORCH_BOX(&distill_loss_backward));
}
