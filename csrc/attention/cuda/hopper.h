// What attention's kernels for Hopper share: persistent, warp-specialized blocks.
//
// A block loops over work tiles, each of them rows of one head of one sequence. A producer warpgroup, with few
// registers, issues the TMA copies; two consumer warpgroups own 64 rows each and loop over the other operand of their
// sequence, for example the keys, whose matrices arrive in two ring buffers. A work tile can be several passes of the
// consumers, each over new owned rows: then the other operand fits in the rings as a whole and is loaded once.
#pragma once

#include <algorithm>

#include "attention/cuda/rows.h"
#include "common/cuda_hopper.h"

namespace bert_fast {

constexpr int kConsumers = 2;
constexpr int kHopperThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kPassRows = kConsumers * kRows;  // that a block owns in a pass
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// The work tiles: `blocks` of `passes` times kPassRows rows for each head of each sequence.
struct HopperWork {
  int tiles, blocks, passes;
};

// A matrix of several tiles of ROWS rows, one for each 64 columns (common/cuda_hopper.h).
template <int ROWS>
struct TiledRows {
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return (chunk / 8 * ROWS + row) * kTileColumns + (chunk % 8 ^ row % 8) * 8;
  }
};

// The shared memory of a block: SLOTS slots of OWNED matrices for each consumer, two rings of STAGES matrices of STEP
// rows, and 4-byte numbers, EXTRA for each consumer and STAGE_EXTRA for each stage of the first ring.
template <class T, int DIM, int STEP, int STAGES, int SLOTS, int OWNED, int EXTRA, int STAGE_EXTRA>
struct HopperMemory {
  static constexpr int kDim = DIM, kStep = STEP, kStages = STAGES, kSlots = SLOTS, kOwned = OWNED;
  static constexpr int kExtraBytes = STAGE_EXTRA * 4;  // loaded with each matrix of the first ring
  static constexpr int kOwnedNumbers = kRows * DIM, kRingNumbers = STEP * DIM;
  static constexpr int kTiles = kConsumers * SLOTS * OWNED * kOwnedNumbers + 2 * STAGES * kRingNumbers;
  static constexpr int kFloats = kConsumers * EXTRA + STAGES * STAGE_EXTRA;
  static constexpr int kBarriers = 2 * kConsumers * SLOTS + 4 * STAGES + 2;
  static constexpr int kBytes = kTileAlignment + kTiles * 2 + kFloats * 4 + kBarriers * 8;
  static_assert(kBytes <= 227 << 10, "the shared memory of a block");
  static_assert(STAGE_EXTRA % 4 == 0 && EXTRA % 4 == 0, "bulk copies and barriers are aligned");

  __device__ __forceinline__ HopperMemory() : tiles(tile_memory<T>()) {}

  __device__ __forceinline__ T* owned(int group, int slot, int which) const {
    return tiles + ((group * SLOTS + slot) * OWNED + which) * kOwnedNumbers;
  }
  __device__ __forceinline__ T* stage(int ring, int slot) const {
    return tiles + kConsumers * SLOTS * OWNED * kOwnedNumbers + (ring * STAGES + slot) * kRingNumbers;
  }
  __device__ __forceinline__ float* stage_extra(int slot) const {
    return reinterpret_cast<float*>(tiles + kTiles) + slot * STAGE_EXTRA;
  }
  __device__ __forceinline__ float* extra(int group) const { return stage_extra(STAGES) + group * EXTRA; }
  __device__ __forceinline__ Mbarrier* barriers() const { return reinterpret_cast<Mbarrier*>(extra(kConsumers)); }
  __device__ __forceinline__ Mbarrier* owned_full(int group, int slot) const {
    return barriers() + group * SLOTS + slot;
  }
  __device__ __forceinline__ Mbarrier* owned_empty(int group, int slot) const {
    return owned_full(kConsumers + group, slot);
  }
  __device__ __forceinline__ Mbarrier* full(int ring, int slot) const {
    return owned_full(2 * kConsumers, 0) + ring * STAGES + slot;
  }
  __device__ __forceinline__ Mbarrier* empty(int ring, int slot) const { return full(2 + ring, slot); }
  __device__ __forceinline__ Mbarrier* last(int ring) const { return full(4, ring); }

  // Called by all threads of the block.
  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kConsumers * SLOTS; ++i) {
        mbarrier_init(owned_full(0, i), 1);
        mbarrier_init(owned_empty(0, i), kBlockWarps);
      }
      for (int i = 0; i < 2 * STAGES; ++i) {
        mbarrier_init(full(0, i), 1);
        mbarrier_init(empty(0, i), kConsumers * kBlockWarps);
      }
      for (int ring = 0; ring < 2; ++ring) mbarrier_init(last(ring), 1);
      mbarrier_init_fence();
    }
    __syncthreads();
  }

  T* tiles;
};

// The source of a matrix: part `part` of a tensor.
struct Source {
  const TensorMap* map;
  int part;
};

// Starts to load rows [row, row + min(ROWS, valid)) of the work tile's sequence and head, in full boxes. Called by one
// thread.
template <class T, int D, int ROWS>
__device__ __forceinline__ void load_rows(T* to, const Source& from, const OwnedRows& owned, int row, int valid,
                                          Mbarrier* barrier) {
#pragma unroll
  for (int first = 0; first < ROWS; first += kBoxRows) {
    if (first >= valid) break;
#pragma unroll
    for (int column = 0; column < D; column += kTileColumns) {
      T* box = to + (column / kTileColumns * ROWS + first) * kTileColumns;
      tma_load_box(box, *from.map, column, owned.head, from.part, static_cast<int>(owned.first) + row + first, barrier);
    }
  }
}

constexpr int kBoxBytes = kBoxRows * kTileColumns * 2;

// The producer: its warp 0 fills the slots of owned rows and ring 0, its warp 1 ring 1.
template <class T, class Memory>
struct Producer {
  static constexpr int kDim = Memory::kDim, kStep = Memory::kStep, kSlots = Memory::kSlots;

  // Loads the rows that the consumers own in a pass; a consumer may have none.
  __device__ __forceinline__ void fill_owned(const Source (&sources)[Memory::kOwned], const OwnedRows& owned,
                                             int pass) {
    constexpr int kBytes = Memory::kOwned * kDim / kTileColumns * kBoxBytes;
#pragma unroll
    for (int group = 0; group < kConsumers; ++group) {
      const int row = owned.row + pass * kPassRows + group * kRows;
      if (row >= owned.length) continue;
      const int use = owned_uses[group]++, slot = use % kSlots;
      mbarrier_wait(memory.owned_empty(group, slot), use / kSlots % 2 ^ 1);
      if (lane == 0) {
        mbarrier_arrive_expect_tx(memory.owned_full(group, slot), kBytes);
#pragma unroll
        for (int i = 0; i < Memory::kOwned; ++i) {
          load_rows<T, kDim, kRows>(memory.owned(group, slot, i), sources[i], owned, row, kRows,
                                    memory.owned_full(group, slot));
        }
      }
    }
  }

  // Loads the whole other operand through a ring. Rows past its end become zeros, since the products multiply them by
  // zeros and memory there may hold NaN. `extra` is the source of the kExtraBytes that accompany each matrix.
  __device__ __forceinline__ void fill_ring(int ring, const Source& source, const float* extra,
                                            const OwnedRows& owned) {
    for (int row = 0; row < owned.length; row += kStep, ++uses) {
      const int slot = uses % Memory::kStages, valid = owned.length - row;
      T* to = memory.stage(ring, slot);
      const bool full = valid >= kStep;
      Mbarrier* barrier = full ? memory.full(ring, slot) : memory.last(ring);
      const int boxes = (full ? kStep / kBoxRows : (valid + kBoxRows - 1) / kBoxRows) * (kDim / kTileColumns);
      mbarrier_wait(memory.empty(ring, slot), uses / Memory::kStages % 2 ^ 1);
      if (lane == 0) {
        mbarrier_arrive_expect_tx(barrier, boxes * kBoxBytes + (extra != nullptr ? Memory::kExtraBytes : 0));
        load_rows<T, kDim, kStep>(to, source, owned, row, valid, barrier);
        if (extra != nullptr) {
          bulk_load(memory.stage_extra(slot), extra + row / kStep * (Memory::kExtraBytes / 4), Memory::kExtraBytes,
                    barrier);
        }
      }
      if (full) continue;
      mbarrier_wait(barrier, lasts++ % 2);
      constexpr int kChunks = kDim / 8;
      for (int i = valid * kChunks + lane; i < kStep * kChunks; i += kWarp) {
        const float zeros[8] = {};
        store_pack<8, true>(to + TiledRows<kStep>::offset(i / kChunks, i % kChunks), 8, zeros);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(memory.full(ring, slot));
    }
  }

  // Loads everything that the consumers read, in their order. `extra` holds `batch.blocks` times kExtraBytes for each
  // head of each sequence, or is null.
  __device__ __forceinline__ void run(const AttentionBatch& batch, const HopperWork& work,
                                      const Source (&owned_sources)[Memory::kOwned], const Source (&rings)[2],
                                      const float* extra) {
    const int ring = threadIdx.x % kWarpgroup / kWarp;
    if (ring > 1) return;
    for (int tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) {
      const OwnedRows owned(batch, work.passes * kPassRows, tile, work.blocks);
      if (owned.row >= owned.length) continue;
      if (ring == 0) fill_owned(owned_sources, owned, 0);
      const int64_t head = (owned.sequence * batch.heads + owned.head) * batch.blocks;
      const float* with = extra != nullptr && ring == 0 ? extra + head * (Memory::kExtraBytes / 4) : nullptr;
      const Source source = {ring == 0 ? rings[0].map : rings[1].map, ring == 0 ? rings[0].part : rings[1].part};
      fill_ring(ring, source, with, owned);
      for (int pass = 1; ring == 0 && pass < work.passes; ++pass) fill_owned(owned_sources, owned, pass);
    }
  }

  const Memory& memory;
  int lane = static_cast<int>(threadIdx.x) % kWarp;
  int uses = 0, lasts = 0, owned_uses[kConsumers] = {};
};

// A consumer's view of the rings and of its slots.
template <class Memory>
struct Consumer {
  __device__ __forceinline__ int slot(int step) const { return (uses + step) % Memory::kStages; }

  // Waits for matrix number `step` of the work tile.
  __device__ __forceinline__ auto* wait(int ring, int step) const {
    mbarrier_wait(memory.full(ring, slot(step)), (uses + step) / Memory::kStages % 2);
    return memory.stage(ring, slot(step));
  }

  // This warp has read the matrix for the last time; before the last pass of a work tile it stays in the ring.
  __device__ __forceinline__ void release(int ring, int step, bool last_pass) const {
    if (last_pass) leave(memory.empty(ring, slot(step)));
  }

  // The last pass of a consumer that owns no rows in it.
  __device__ __forceinline__ void skip(int steps) const {
    for (int step = 0; step < steps; ++step) {
      for (int ring = 0; ring < 2; ++ring) {
        wait(ring, step);
        release(ring, step, true);
      }
    }
  }

  __device__ __forceinline__ int owned_slot() const { return owned_uses % Memory::kSlots; }

  __device__ __forceinline__ void wait_owned(int group) const {
    mbarrier_wait(memory.owned_full(group, owned_slot()), owned_uses / Memory::kSlots % 2);
  }

  // The producer may overwrite what this warp has written to its slot.
  __device__ __forceinline__ void release_owned(int group) {
    fence_async_proxy();
    leave(memory.owned_empty(group, owned_slot()));
    ++owned_uses;
  }

  static __device__ __forceinline__ void leave(Mbarrier* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(barrier);
  }

  const Memory& memory;
  int uses = 0, owned_uses = 0;
};

// Runs body(owned, steps, last_pass) for each pass in which the consumer `group` owns rows, owned.row being the first,
// and idle(owned) for each in which it owns none.
template <class Memory, class Body, class Idle>
__device__ __forceinline__ void for_each_pass(const AttentionBatch& batch, const HopperWork& work, int group,
                                              Consumer<Memory>& consumer, const Body& body, const Idle& idle) {
  for (int tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) {
    OwnedRows owned(batch, work.passes * kPassRows, tile, work.blocks);
    const int first = owned.row, steps = (owned.length + Memory::kStep - 1) / Memory::kStep;
    for (int pass = 0; pass < work.passes; ++pass) {
      const bool last_pass = pass + 1 == work.passes;
      owned.row = first + pass * kPassRows + group * kRows;
      if (owned.row < owned.length) {
        body(owned, steps, last_pass);
        continue;
      }
      idle(owned);
      if (last_pass && first < owned.length) consumer.skip(steps);
    }
    if (first < owned.length) consumer.uses += steps;
  }
}

// s (64, ROWS) = left (64, D) right (ROWS, D)^T.
template <class T, int D, int ROWS>
__device__ __forceinline__ void start_scores(float (&s)[ROWS / 8][4], const T* left, const T* right) {
  const uint64_t a = make_descriptor(left, 0), b = make_descriptor(right, 0);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int tile = k / 4 * kTileColumns, column = k % 4 * 16;
    wgmma<T, ROWS>(s, advance_descriptor(a, tile * kRows + column), advance_descriptor(b, tile * ROWS + column), k > 0);
  }
}

// c (64, D) += p (64, STEP) right (STEP, D), p from round_scores.
template <class T, int D, int STEP>
__device__ __forceinline__ void start_sums(float (&c)[D / 8][4], const uint32_t (&p)[STEP / 16][4], const T* right) {
  const uint64_t b = make_descriptor(right, STEP * kTileColumns * 2);
#pragma unroll
  for (int k = 0; k < STEP / 16; ++k) wgmma<T, D>(c, p[k], advance_descriptor(b, k * 16 * kTileColumns));
}

// Where the column sums of part `part` of dqkv over the 64 owned rows are stored; null without a bias and for rows past
// the longest sequence.
__device__ __forceinline__ float* partial_of(float* partial, const OwnedRows& owned, const AttentionBatch& batch,
                                             int part) {
  const int block = owned.row / kRows;
  if (partial == nullptr || block >= batch.blocks) return nullptr;
  return partial + ((owned.sequence * batch.blocks + block) * 3 + part) * batch.heads * batch.dim +
         owned.head * batch.dim;
}

__device__ __forceinline__ void zero_sums(float* sums, int dim, const Team& team) {
  for (int d = team.thread; d < dim; d += team.threads) sums[d] = 0.0f;
}

// The statistics of the 64 owned queries, (4, 64) of (B, N, blocks, 4, 64).
__device__ __forceinline__ float* statistics_of(float* statistics, const OwnedRows& owned,
                                                const AttentionBatch& batch) {
  const int64_t head = owned.sequence * batch.heads + owned.head;
  return statistics + (head * batch.blocks + owned.row / kRows) * kStatistics * kRows;
}

// Divides the rows of every sequence into work tiles: of two passes if the other operand fits in the rings.
template <class Memory>
inline HopperWork plan_work(const AttentionBatch& batch) {
  const bool fits = ceil_div(batch.max_seqlen, Memory::kStep) <= Memory::kStages;
  const int passes = fits && batch.max_seqlen > kPassRows ? 2 : 1;
  const int blocks = static_cast<int>(ceil_div(batch.max_seqlen, passes * kPassRows));
  return {static_cast<int>(batch.sequences) * batch.heads * blocks, blocks, passes};
}

inline dim3 grid_of(const HopperWork& work, const Tensor& on) {
  return dim3(static_cast<unsigned>(std::min(work.tiles, multiprocessors_of(on))));
}

template <class Body>
inline void dispatch_hopper_dim(int dim, const Body& body) {
  if (dim == 64) {
    body(std::integral_constant<int, 64>{});
  } else {
    body(std::integral_constant<int, 128>{});
  }
}

template <class T>
inline TensorMap map_qkv(const T* qkv, const AttentionBatch& batch) {
  return make_tensor_map(qkv, {batch.total, 3, batch.heads, batch.dim},
                         {batch.stride_t, batch.stride_part, batch.stride_n});
}

// x (T, N, D).
template <class T>
inline TensorMap map_rows(const T* x, const AttentionBatch& batch) {
  const int64_t width = int64_t{batch.heads} * batch.dim;
  return make_tensor_map(x, {batch.total, 1, batch.heads, batch.dim}, {width, width, batch.dim});
}

}  // namespace bert_fast
