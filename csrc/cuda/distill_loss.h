// What bind.cpp, which knows torch, asks of distill_loss.cu, which does not.
#pragma once
#include <cstdint>

enum class Type { float32, bfloat16, float16 };

// One side's states and spans, see mtllm_engine/spans.py.
struct Side {
  const void* rows_SD;
  const int *bounds_P2, *chunks_C3;
  int num_chunks;
  float* slots;  // scratch of num_slots(tokens) rows; null in backward
};

struct ForwardArguments {
  Type type;
  int P, D;
  Side student, teacher;
  const float *norm_weight_D, *weight_P;
  float eps;
  const int* aligned_S;  // or null
  float *pooled_error, *token_error;
  double* moments;
  float* error_PD;                  // or null
  double *totals_W5, *teacher_WD;  // scratch, W = num_groups(P)
  double* token_error_C;            // scratch, C = student.num_chunks
};

struct BackwardArguments {
  Type type;
  int D;
  Side student;
  const void* teacher_TD;  // null without aligned_S
  const float *norm_weight_D, *weight_P;
  float eps;
  const int* aligned_S;  // or null
  const float *error_PD, *pooled_grad, *token_grad;
  void* grad_SD;
};

constexpr int CHUNK = 64;  // tokens, as in mtllm_engine/spans.py
constexpr int MAX_WIDTH = 8192;

// A long span's sums begin in slot start / (CHUNK / 2), one for each chunk: over CHUNK tokens have at least as many
// halves of a chunk as chunks, so the next long span's begin behind them.
constexpr int64_t num_slots(int64_t tokens) { return tokens / (CHUNK / 2); }
constexpr int num_groups(int P) { return P < 512 ? P : 512; }

// Both return what went wrong, or null.
extern "C" const char* mtllm_distill_loss_forward(const ForwardArguments* arguments, void* stream);
extern "C" const char* mtllm_distill_loss_backward(const BackwardArguments* arguments, void* stream);
