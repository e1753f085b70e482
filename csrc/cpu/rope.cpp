// rope on the CPU; kernels/rope/__init__.py has the formula and the letters. Out may be the source: then only what
// turns is touched.
#include <torch/csrc/stable/library.h>

#include "rows.h"

namespace mtllm {
namespace {

// The k pairs of one token's heads, K wide. In and out may be the same: each pair is read before it is written.
VECTORISED void rotate(const float* in, float* out, int64_t num_heads, const float* cos_k, const float* sin_k,
                       float sign, int64_t k, int64_t K) {
  for (int64_t head = 0; head < num_heads; ++head, in += K, out += K) {
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) {
      const float left = in[i], right = in[k + i], cos = cos_k[i], sin = sign * sin_k[i];
      out[i] = left * cos - right * sin;
      out[k + i] = right * cos + left * sin;
    }
  }
}

}  // namespace

void rope(const Tensor& source_SXK, Tensor out_SXK, const Tensor& cos_Sk, const Tensor& sin_Sk, int64_t num_rotated,
          bool inverse) {
  const int64_t S = source_SXK.size(0), K = source_SXK.size(2), width = source_SXK.size(1) * K;
  const int64_t k = cos_Sk.size(1), turned = num_rotated * K;
  const float *cos = data<const float>(cos_Sk), *sin = data<const float>(sin_Sk), sign = inverse ? -1.f : 1.f;
  with_type(source_SXK, [&](auto zero) {
    using T = decltype(zero);
    const T* source = data<const T>(source_SXK);
    T* out = data<T>(out_SXK);
    share_rows(S, width, [&](int64_t first, int64_t last) {
      std::vector<float> buffer(turned);
      for (int64_t i = first; i < last; ++i) {
        const T* row = source + i * width;
        const float* in = load(row, turned, buffer.data());
        store(out + i * width, turned, buffer.data(), [&](float* rotated) {
          rotate(in, rotated, num_rotated, cos + i * k, sin + i * k, sign, k, K);
        });
        if (out == source) continue;
        for (int64_t rest = 2 * k; rest < turned && 2 * k < K; rest += K)
          std::copy_n(row + rest, K - 2 * k, out + i * width + rest);
        std::copy(row + turned, row + width, out + i * width + turned);
      }
    });
  });
}

}  // namespace mtllm

STABLE_TORCH_LIBRARY_IMPL(mtllm, CPU, library) { library.impl("rope", TORCH_BOX(&mtllm::rope)); }
