// The unit of work: a head of a sequence. Shared by cpu.cpp and the kernels.
#pragma once

#include "common/dropout.h"

namespace bert_fast {

enum QkvPart { kQuery = 0, kKey = 1, kValue = 2 };

template <class T>
struct AttentionHead {
  const T* qkv;  // the query of the sequence's first token
  int64_t token_stride, part_stride;
  const float* bias;  // of the query, or null
  int64_t bias_stride;
  int64_t length, dim;
  float scale;
  const Dropout* dropout;
  uint32_t plane, first_row;  // of the dropout mask: the head, and the index of the first token in the packed batch

  const T* part(QkvPart which) const { return qkv + which * part_stride; }
  const float* part_bias(QkvPart which) const { return bias ? bias + which * bias_stride : nullptr; }
};

// What the backward pass reads and writes in addition; dout and dqkv are contiguous (T, N, D) and (T, 3, N, D).
template <class T>
struct AttentionGrad {
  const T* dout;
  T* dqkv;
  float* dbias;  // (3, ...) of this head and sequence, initialized to zero
  int64_t heads;
};

}  // namespace bert_fast
