// distill_loss on the CPU; kernels/distill_loss/__init__.py has the formula and the letters.
//
// Forward, one pass over both sides' rows: while a row is in the first-level cache it is normalised (but for the norm's
// weight, which a span's mean takes once), added to its span's sum, and compared with its partner. Whoever finishes a
// span of up to CHUNK tokens sums it too; of longer ones the chunks are shared out before, each summed in a slot of its
// own, so that one span as long as the pack keeps all cores busy. Backward: one pass over the student's rows.
// Every order of summation is fixed: results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "rms.h"
#include "rows.h"

namespace mtllm {
namespace {

using torch::stable::Tensor;

constexpr int64_t CHUNK = 64;        // tokens, as in mtllm_engine/spans.py
constexpr int64_t MAX_GROUPS = 256;  // of spans: each keeps a sum of its teacher's means, D doubles
constexpr int64_t COLUMNS = 512;     // of those sums that are added up at a time

struct Moments {
  double weight = 0, error = 0, cosine = 0, norm = 0;

  void add(double scale, const Moments& other) {
    weight += scale * other.weight;
    error += scale * other.error;
    cosine += scale * other.cosine;
    norm += scale * other.norm;
  }
};

VECTORISED void add_scaled(const float* x_D, float scale, float* sum_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) sum_D[i] += scale * x_D[i];
}

VECTORISED void scale_product(const float* x_D, const float* y_D, float scale, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = scale * x_D[i] * y_D[i];
}

VECTORISED void combine(float a, const float* x_D, float b, const float* y_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i) out_D[i] = a * x_D[i] + b * y_D[i];
}

// A token's error ||w (x / rms(x) - z / rms(z))||^2, given the inverse rms of both.
VECTORISED float token_error(const float* x_D, float x_scale, const float* z_D, float z_scale, const float* w_D,
                             int64_t D) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < D; ++i) {
    const float error = w_D[i] * (x_scale * x_D[i] - z_scale * z_D[i]);
    sum += error * error;
  }
  return sum;
}

// Adds scale / 2 times its gradient with respect to x / rms(x).
VECTORISED void add_token_gradient(const float* up_D, float scale, const float* x_D, float x_scale, const float* z_D,
                                   float z_scale, const float* w_D, float* out_D, int64_t D) {
#pragma omp simd
  for (int64_t i = 0; i < D; ++i)
    out_D[i] = up_D[i] + scale * w_D[i] * w_D[i] * (x_scale * x_D[i] - z_scale * z_D[i]);
}

// From a span's sums to its means: their difference, their moments, and weight times the teacher's added to sum_D.
VECTORISED Moments compare(const float* student_D, float student_scale, const float* teacher_D, float teacher_scale,
                           const float* w_D, double weight, float* error_D, double* sum_D, int64_t D) {
  double error = 0, cross = 0, student = 0, teacher = 0;
#pragma omp simd reduction(+ : error, cross, student, teacher)
  for (int64_t i = 0; i < D; ++i) {
    const float s32 = w_D[i] * (student_scale * student_D[i]), t32 = w_D[i] * (teacher_scale * teacher_D[i]);
    const double s = s32, t = t32;
    error_D[i] = s32 - t32;
    error += (s - t) * (s - t);
    cross += s * t;
    student += s * s;
    teacher += t * t;
    sum_D[i] += weight * t;
  }
  const double least = 1e-16;  // of a squared norm: torch.cosine_similarity's eps, squared
  return {1, error, cross / std::sqrt(std::max(student, least) * std::max(teacher, least)), teacher};
}

VECTORISED void add_columns(const double* parts_WD, int64_t W, int64_t D, int64_t columns, double* sum_D) {
  std::fill_n(sum_D, columns, 0.);
  for (int64_t g = 0; g < W; ++g) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) sum_D[i] += parts_WD[g * D + i];
  }
}

// One side's states and spans, see mtllm_engine/spans.py.
template <class T>
struct Side {
  const T* rows_SD;
  int64_t num_tokens;
  const int32_t *bounds_P2, *chunks_C3;
  int64_t num_chunks;

  Side(const Tensor& states, const Tensor& bounds, const Tensor& chunks)
      : rows_SD(data<const T>(states)),
        num_tokens(states.size(0)),
        bounds_P2(data<const int32_t>(bounds)),
        chunks_C3(data<const int32_t>(chunks)),
        num_chunks(chunks.size(0)) {}

  int64_t start(int64_t span) const { return bounds_P2[2 * span]; }
  int64_t end(int64_t span) const { return bounds_P2[2 * span + 1]; }
  int64_t length(int64_t span) const { return end(span) - start(span); }
  bool is_long(int64_t span) const { return length(span) > CHUNK; }

  // Of all chunks of long spans each has its own: over CHUNK tokens have at least as many halves of a chunk as chunks.
  int64_t slot(int64_t span, int64_t token) const {
    return start(span) / (CHUNK / 2) + (token - start(span)) / CHUNK;
  }
  int64_t num_slots() const { return num_tokens / (CHUNK / 2); }
};

template <class T>
class Forward {
 public:
  Forward(Side<T> student, Side<T> teacher, const float* w_D, float eps, const float* weight_P,
          const int32_t* aligned_S, float* error_PD, int64_t P, int64_t D)
      : student_(student), teacher_(teacher), w_D_(w_D), eps_(eps), weight_P_(weight_P), aligned_S_(aligned_S),
        error_PD_(error_PD), P_(P), D_(D), W_(std::min(P, MAX_GROUPS)),
        student_slots_(new float[student.num_slots() * D]), teacher_slots_(new float[teacher.num_slots() * D]),
        token_error_C_(student.num_chunks), token_error_W_(W_), moments_W_(W_), teacher_WD_(new double[W_ * D]) {}

  void run(float* pooled_error, float* token_error, double* moments) {
    const int64_t num_chunks = student_.num_chunks, work = (student_.num_tokens + teacher_.num_tokens) * D_;
    share_out(num_chunks + teacher_.num_chunks, work, [&](int64_t unit) {
      if (unit < num_chunks)
        token_error_C_[unit] = add_chunk(student_, student_slots_.get(), aligned_S_, unit);
      else
        add_chunk(teacher_, teacher_slots_.get(), nullptr, unit - num_chunks);
    });
    share_out(W_, work, [&](int64_t group) { finish(group); });
    add_up(pooled_error, token_error, moments);
  }

 private:
  // Adds normalised rows, without w, to a sum if there is one; returns the error of those that have partners.
  double add_rows(const Side<T>& side, const int32_t* partner_S, int64_t start, int64_t end, float* sum_D) const {
    Rows<T> rows(side.rows_SD, D_), partners(teacher_.rows_SD, D_);
    double error = 0;
    for (int64_t i = start; i < end; ++i) {
      const float* x_D = rows[i];
      const float scale = inverse_rms(x_D, eps_, D_);
      if (sum_D) add_scaled(x_D, scale, sum_D, D_);
      if (partner_S && partner_S[i] >= 0) {
        const float* z_D = partners[partner_S[i]];
        error += token_error(x_D, scale, z_D, inverse_rms(z_D, eps_, D_), w_D_, D_);
      }
    }
    return error;
  }

  // What no finisher of a span does: chunks of long spans, and those of none where tokens have partners.
  double add_chunk(const Side<T>& side, float* slots, const int32_t* partner_S, int64_t chunk) const {
    const int32_t* row = side.chunks_C3 + 3 * chunk;
    const int64_t span = row[0], start = row[1], end = row[2];
    if (span < 0) return partner_S ? add_rows(side, partner_S, start, end, nullptr) : 0;
    if (!side.is_long(span)) return 0;
    float* sum_D = slots + side.slot(span, start) * D_;
    std::fill_n(sum_D, D_, 0.f);
    return add_rows(side, partner_S, start, end, sum_D);
  }

  double add_span(const Side<T>& side, const float* slots, const int32_t* partner_S, int64_t span, float* sum_D) const {
    std::fill_n(sum_D, D_, 0.f);
    if (!side.is_long(span)) return add_rows(side, partner_S, side.start(span), side.end(span), sum_D);
    const int64_t last = side.slot(span, side.end(span) - 1);
    for (int64_t slot = side.slot(span, side.start(span)); slot <= last; ++slot)
      add_scaled(slots + slot * D_, 1, sum_D, D_);
    return 0;
  }

  void finish(int64_t group) {
    std::vector<float> student_D(D_), teacher_D(D_), error_D(D_);
    double* sum_D = teacher_WD_.get() + group * D_;
    std::fill_n(sum_D, D_, 0.);
    for (int64_t span = group * P_ / W_; span < (group + 1) * P_ / W_; ++span) {
      token_error_W_[group] += add_span(student_, student_slots_.get(), aligned_S_, span, student_D.data());
      add_span(teacher_, teacher_slots_.get(), nullptr, span, teacher_D.data());
      const Moments moments = compare(
          student_D.data(), 1.f / student_.length(span), teacher_D.data(), 1.f / teacher_.length(span), w_D_,
          weight_P_[span], error_PD_ ? error_PD_ + span * D_ : error_D.data(), sum_D, D_);
      moments_W_[group].add(weight_P_[span], moments);
    }
  }

  void add_up(float* pooled_error, float* token_error, double* moments) const {
    Moments sum;
    double error = 0;
    for (const Moments& part : moments_W_) sum.add(1, part);
    for (double part : token_error_C_) error += part;
    for (double part : token_error_W_) error += part;
    *pooled_error = static_cast<float>(sum.error);
    *token_error = static_cast<float>(error);
    for (double moment : {sum.weight, sum.error, sum.cosine, sum.norm}) *moments++ = moment;
    share_out((D_ + COLUMNS - 1) / COLUMNS, W_ * D_, [&](int64_t block) {
      const int64_t first = block * COLUMNS;
      add_columns(teacher_WD_.get() + first, W_, D_, std::min(COLUMNS, D_ - first), moments + first);
    });
  }

  const Side<T> student_, teacher_;
  const float* const w_D_;
  const float eps_;
  const float* const weight_P_;
  const int32_t* const aligned_S_;  // or null
  float* const error_PD_;           // for backward, or null
  const int64_t P_, D_, W_;
  const std::unique_ptr<float[]> student_slots_, teacher_slots_;
  std::vector<double> token_error_C_, token_error_W_;
  std::vector<Moments> moments_W_;
  const std::unique_ptr<double[]> teacher_WD_;
};

template <class T>
struct Backward {
  Side<T> student;
  const T* teacher_TD;  // or null
  const float* w_D;
  float eps;
  const float *weight_P, *error_PD;
  const int32_t* aligned_S;  // or null
  float pooled_grad, token_grad;
  int64_t D;
  T* grad_SD;

  void run() const {
    share_out(student.num_chunks, student.num_tokens * D, [&](int64_t chunk) { run_chunk(chunk); });
  }

  void run_chunk(int64_t chunk) const {
    const int32_t* row = student.chunks_C3 + 3 * chunk;
    const int64_t span = row[0], start = row[1], end = row[2];
    Rows<T> rows(student.rows_SD, D), partners(teacher_TD, D);
    std::vector<float> up_D(D), both_D(D), out_D(D);
    if (span >= 0) {  // else zeros: the pooled error does not know these tokens
      const float scale = 2 * pooled_grad * weight_P[span] / student.length(span);
      scale_product(w_D, error_PD + span * D, scale, up_D.data(), D);
    }
    for (int64_t i = start; i < end; ++i) {
      const float *x_D = rows[i], *gradient_D = up_D.data();
      const float scale = inverse_rms(x_D, eps, D);
      if (aligned_S && aligned_S[i] >= 0) {
        const float* z_D = partners[aligned_S[i]];
        const float z_scale = inverse_rms(z_D, eps, D);
        add_token_gradient(up_D.data(), 2 * token_grad, x_D, scale, z_D, z_scale, w_D, both_D.data(), D);
        gradient_D = both_D.data();
      }
      // through x / rms(x)
      const float along = scale * scale * scale * dot(x_D, gradient_D, D) / static_cast<float>(D);
      store(grad_SD + i * D, D, out_D.data(), [&](float* out) { combine(scale, gradient_D, -along, x_D, out, D); });
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> distill_loss_forward(
    const Tensor& student_SD, const Tensor& teacher_TD, const Tensor& norm_weight_D, double eps,
    const Tensor& student_bounds_P2, const Tensor& student_chunks_C3, const Tensor& teacher_bounds_P2,
    const Tensor& teacher_chunks_C3, const Tensor& weight_P, const std::optional<Tensor>& aligned_S, bool keep_error) {
  const int64_t P = weight_P.size(0), D = student_SD.size(1);
  Tensor pooled_error = torch::stable::new_empty(weight_P, {}), token_error = torch::stable::new_empty(weight_P, {});
  Tensor moments = torch::stable::new_empty(weight_P, {4 + D}, ScalarType::Double);
  Tensor error_PD = torch::stable::new_empty(weight_P, {keep_error ? P : 0, D});
  with_type(student_SD, [&](auto zero) {
    using T = decltype(zero);
    Forward<T>({student_SD, student_bounds_P2, student_chunks_C3}, {teacher_TD, teacher_bounds_P2, teacher_chunks_C3},
               data<const float>(norm_weight_D), static_cast<float>(eps), data<const float>(weight_P),
               optional_data<const int32_t>(aligned_S), keep_error ? data<float>(error_PD) : nullptr, P, D)
        .run(data<float>(pooled_error), data<float>(token_error), data<double>(moments));
  });
  return {pooled_error, token_error, moments, error_PD};
}

Tensor distill_loss_backward(const Tensor& pooled_grad, const Tensor& token_grad, const Tensor& student_SD,
                             const std::optional<Tensor>& partners_TD, const Tensor& norm_weight_D, double eps,
                             const Tensor& student_bounds_P2, const Tensor& student_chunks_C3, const Tensor& weight_P,
                             const Tensor& error_PD, const std::optional<Tensor>& aligned_S) {
  Tensor grad_SD = torch::stable::empty_like(student_SD);
  with_type(student_SD, [&](auto zero) {
    using T = decltype(zero);
    Backward<T>{{student_SD, student_bounds_P2, student_chunks_C3}, optional_data<const T>(partners_TD),
                data<const float>(norm_weight_D), static_cast<float>(eps), data<const float>(weight_P),
                data<const float>(error_PD), optional_data<const int32_t>(aligned_S),
                *data<const float>(pooled_grad), *data<const float>(token_grad), student_SD.size(1), data<T>(grad_SD)}
        .run();
  });
  return grad_SD;
}

}  // namespace mtllm

STABLE_TORCH_LIBRARY_IMPL(mtllm, CPU, library) {
  library.impl("distill_loss_forward", TORCH_BOX(&mtllm::distill_loss_forward));
  library.impl("distill_loss_backward", TORCH_BOX(&mtllm::distill_loss_backward));
}
