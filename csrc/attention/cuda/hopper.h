// What the kernels of attention for Hopper share: a block's memory, the warps that fill it, and products of its tiles.
//
// A block stays on its multiprocessor and takes one piece of work after the other: rows of one head of one sequence.
// One warpgroup moves tiles, with few registers; two others, the teams, own 64 rows each and walk over the other side
// of their sequence, whose tiles come through two rings. Where several passes of the teams over new rows make up a
// piece, the other side fits the rings as a whole and is moved once.
#pragma once

#include <algorithm>

#include "attention/cuda/rows.h"
#include "common/cuda_hopper.h"

namespace bert_fast {

constexpr int kTeams = 2;
constexpr int kHopperThreads = (kTeams + 1) * kWarpgroup;
constexpr int kTeamRows = kTeams * kRows;  // owned in a pass
constexpr int kMovingRegisters = 40, kTeamRegisters = 232;

// The pieces of work: `blocks` of `passes` times kTeamRows rows for each head and sequence.
struct HopperWork {
  int pieces, blocks, passes;
};

// Tiles side by side, ROWS rows each.
template <int ROWS>
struct TiledRows {
  static __device__ __forceinline__ int place(int row, int chunk) {
    return (chunk / 8 * ROWS + row) * kTileColumns + (chunk % 8 ^ row % 8) * 8;
  }
};

// Shared memory of a block: `SLOTS` places for OWNED matrices of each team, two rings of STAGES matrices of STEP rows,
// and 4-byte numbers, EXTRA of each team and STAGE_EXTRA of each stage of the first ring.
template <class T, int DIM, int STEP, int STAGES, int SLOTS, int OWNED, int EXTRA, int STAGE_EXTRA>
struct HopperMemory {
  static constexpr int kDim = DIM, kStep = STEP, kStages = STAGES, kSlots = SLOTS, kOwned = OWNED;
  static constexpr int kExtraBytes = STAGE_EXTRA * 4;  // that come with a matrix of the first ring
  static constexpr int kOwnNumbers = kRows * DIM, kRingNumbers = STEP * DIM;
  static constexpr int kTiles = kTeams * SLOTS * OWNED * kOwnNumbers + 2 * STAGES * kRingNumbers;
  static constexpr int kFloats = kTeams * EXTRA + STAGES * STAGE_EXTRA;
  static constexpr int kBarriers = 2 * kTeams * SLOTS + 4 * STAGES + 2;
  static constexpr int kBytes = kTileAlignment + kTiles * 2 + kFloats * 4 + kBarriers * 8;
  static_assert(kBytes <= 227 << 10, "what a block may have");
  static_assert(STAGE_EXTRA % 4 == 0 && EXTRA % 4 == 0, "bulk copies and barriers are aligned");

  __device__ __forceinline__ HopperMemory() : tiles(tile_memory<T>()) {}

  __device__ __forceinline__ T* own(int team, int slot, int which) const {
    return tiles + ((team * SLOTS + slot) * OWNED + which) * kOwnNumbers;
  }
  __device__ __forceinline__ T* stage(int ring, int slot) const {
    return tiles + kTeams * SLOTS * OWNED * kOwnNumbers + (ring * STAGES + slot) * kRingNumbers;
  }
  __device__ __forceinline__ float* stage_extra(int slot) const {
    return reinterpret_cast<float*>(tiles + kTiles) + slot * STAGE_EXTRA;
  }
  __device__ __forceinline__ float* extra(int team) const { return stage_extra(STAGES) + team * EXTRA; }
  __device__ __forceinline__ Mbarrier* barriers() const { return reinterpret_cast<Mbarrier*>(extra(kTeams)); }
  __device__ __forceinline__ Mbarrier* own_full(int team, int slot) const { return barriers() + team * SLOTS + slot; }
  __device__ __forceinline__ Mbarrier* own_empty(int team, int slot) const { return own_full(kTeams + team, slot); }
  __device__ __forceinline__ Mbarrier* full(int ring, int slot) const {
    return own_full(2 * kTeams, 0) + ring * STAGES + slot;
  }
  __device__ __forceinline__ Mbarrier* empty(int ring, int slot) const { return full(2 + ring, slot); }
  __device__ __forceinline__ Mbarrier* last(int ring) const { return full(4, ring); }

  // For all threads of the block.
  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kTeams * SLOTS; ++i) {
        init_barrier(own_full(0, i), 1);
        init_barrier(own_empty(0, i), kBlockWarps);
      }
      for (int i = 0; i < 2 * STAGES; ++i) {
        init_barrier(full(0, i), 1);
        init_barrier(empty(0, i), kTeams * kBlockWarps);
      }
      for (int ring = 0; ring < 2; ++ring) init_barrier(last(ring), 1);
      fence_barriers();
    }
    __syncthreads();
  }

  T* tiles;
};

// Where a matrix is moved from: part `part` of the tensor.
struct Source {
  const TensorMap* map;
  int part;
};

// Start to move rows [row, row + min(ROWS, valid)) of the piece's sequence and head, in whole boxes; one thread's task.
template <class T, int D, int ROWS>
__device__ __forceinline__ void move_rows(T* to, const Source& from, const OwnedRows& own, int row, int valid,
                                          Mbarrier* barrier) {
#pragma unroll
  for (int first = 0; first < ROWS; first += kBoxRows) {
    if (first >= valid) break;
#pragma unroll
    for (int column = 0; column < D; column += kTileColumns) {
      T* box = to + (column / kTileColumns * ROWS + first) * kTileColumns;
      load_box(box, *from.map, column, own.head, from.part, static_cast<int>(own.first) + row + first, barrier);
    }
  }
}

constexpr int kBoxBytes = kBoxRows * kTileColumns * 2;

// The moving warps: warp 0 fills the teams' own slots and ring 0, warp 1 ring 1.
template <class T, class Memory>
struct Mover {
  static constexpr int kDim = Memory::kDim, kStep = Memory::kStep, kSlots = Memory::kSlots;

  // The teams' rows of a pass; a team without any gets none.
  __device__ __forceinline__ void fill_own(const Source (&sources)[Memory::kOwned], const OwnedRows& own, int pass) {
    constexpr int kBytes = Memory::kOwned * kDim / kTileColumns * kBoxBytes;
#pragma unroll
    for (int team = 0; team < kTeams; ++team) {
      const int row = own.row + pass * kTeamRows + team * kRows;
      if (row >= own.length) continue;
      const int use = own_uses[team]++, slot = use % kSlots;
      wait_barrier(memory.own_empty(team, slot), use / kSlots % 2 ^ 1);
      if (lane == 0) {
        arrive_expecting(memory.own_full(team, slot), kBytes);
#pragma unroll
        for (int i = 0; i < Memory::kOwned; ++i) {
          move_rows<T, kDim, kRows>(memory.own(team, slot, i), sources[i], own, row, kRows,
                                    memory.own_full(team, slot));
        }
      }
    }
  }

  // The whole other side, to the ring. Rows behind its end become zeros, whatever they are: the products multiply them
  // by zeros. `extra` is what comes with each matrix, kExtraBytes.
  __device__ __forceinline__ void fill_ring(int ring, const Source& source, const float* extra, const OwnedRows& own) {
    for (int row = 0; row < own.length; row += kStep, ++uses) {
      const int slot = uses % Memory::kStages, valid = own.length - row;
      T* to = memory.stage(ring, slot);
      const bool whole = valid >= kStep;
      Mbarrier* barrier = whole ? memory.full(ring, slot) : memory.last(ring);
      const int boxes = (whole ? kStep / kBoxRows : (valid + kBoxRows - 1) / kBoxRows) * (kDim / kTileColumns);
      wait_barrier(memory.empty(ring, slot), uses / Memory::kStages % 2 ^ 1);
      if (lane == 0) {
        arrive_expecting(barrier, boxes * kBoxBytes + (extra != nullptr ? Memory::kExtraBytes : 0));
        move_rows<T, kDim, kStep>(to, source, own, row, valid, barrier);
        if (extra != nullptr) {
          load_bytes(memory.stage_extra(slot), extra + row / kStep * (Memory::kExtraBytes / 4), Memory::kExtraBytes,
                     barrier);
        }
      }
      if (whole) continue;
      wait_barrier(barrier, lasts++ % 2);
      constexpr int kChunks = kDim / 8;
      for (int i = valid * kChunks + lane; i < kStep * kChunks; i += kWarp) {
        const float zeros[8] = {};
        store_pack<8, true>(to + TiledRows<kStep>::place(i / kChunks, i % kChunks), 8, zeros);
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) arrive(memory.full(ring, slot));
    }
  }

  // Everything that the teams will ask for, in their order. `extra` begins with what belongs to the first piece's head
  // and sequence, and goes on with `batch.blocks` times kExtraBytes for each; null for none.
  __device__ __forceinline__ void run(const AttentionBatch& batch, const HopperWork& work,
                                      const Source (&owned)[Memory::kOwned], const Source (&rings)[2],
                                      const float* extra) {
    const int ring = threadIdx.x % kWarpgroup / kWarp;
    if (ring > 1) return;
    for (int piece = blockIdx.x; piece < work.pieces; piece += gridDim.x) {
      const OwnedRows own(batch, work.passes * kTeamRows, piece, work.blocks);
      if (own.row >= own.length) continue;
      if (ring == 0) fill_own(owned, own, 0);
      const int64_t head = (own.sequence * batch.heads + own.head) * batch.blocks;
      const float* with = extra != nullptr && ring == 0 ? extra + head * (Memory::kExtraBytes / 4) : nullptr;
      const Source source = {ring == 0 ? rings[0].map : rings[1].map, ring == 0 ? rings[0].part : rings[1].part};
      fill_ring(ring, source, with, own);
      for (int pass = 1; ring == 0 && pass < work.passes; ++pass) fill_own(owned, own, pass);
    }
  }

  const Memory& memory;
  int lane = static_cast<int>(threadIdx.x) % kWarp;
  int uses = 0, lasts = 0, own_uses[kTeams] = {};
};

// A team's side of the rings and of its slots.
template <class Memory>
struct Taker {
  __device__ __forceinline__ int slot(int step) const { return (uses + step) % Memory::kStages; }

  // The matrix number `step` of the piece, once it is there.
  __device__ __forceinline__ auto* wait(int ring, int step) const {
    wait_barrier(memory.full(ring, slot(step)), (uses + step) / Memory::kStages % 2);
    return memory.stage(ring, slot(step));
  }

  // This warp needs it no more; in passes before the last of a piece it stays.
  __device__ __forceinline__ void release(int ring, int step, bool last_pass) const {
    if (last_pass) leave(memory.empty(ring, slot(step)));
  }

  // A pass without rows.
  __device__ __forceinline__ void skip(int steps) const {
    for (int step = 0; step < steps; ++step) {
      for (int ring = 0; ring < 2; ++ring) {
        wait(ring, step);
        release(ring, step, true);
      }
    }
  }

  __device__ __forceinline__ int own_slot() const { return own_uses % Memory::kSlots; }

  __device__ __forceinline__ void wait_own(int team) const {
    wait_barrier(memory.own_full(team, own_slot()), own_uses / Memory::kSlots % 2);
  }

  // Whatever this warp has written to its slot, the copy engine may overwrite.
  __device__ __forceinline__ void release_own(int team) {
    fence_async_proxy();
    leave(memory.own_empty(team, own_slot()));
    ++own_uses;
  }

  static __device__ __forceinline__ void leave(Mbarrier* barrier) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(barrier);
  }

  const Memory& memory;
  int uses = 0, own_uses = 0;
};

// Run `body(own, last_pass)` for each pass in which the team has rows, own.row being the first; `idle(own)` where it
// has none.
template <class Memory, class Body, class Idle>
__device__ __forceinline__ void for_each_pass(const AttentionBatch& batch, const HopperWork& work, int team,
                                              Taker<Memory>& taker, const Body& body, const Idle& idle) {
  for (int piece = blockIdx.x; piece < work.pieces; piece += gridDim.x) {
    OwnedRows own(batch, work.passes * kTeamRows, piece, work.blocks);
    const int first = own.row, steps = (own.length + Memory::kStep - 1) / Memory::kStep;
    for (int pass = 0; pass < work.passes; ++pass) {
      const bool last_pass = pass + 1 == work.passes;
      own.row = first + pass * kTeamRows + team * kRows;
      if (own.row < own.length) {
        body(own, steps, last_pass);
        continue;
      }
      idle(own);
      if (last_pass && first < own.length) taker.skip(steps);
    }
    if (first < own.length) taker.uses += steps;
  }
}

// s (64, ROWS) = left (64, D) right (ROWS, D)^T.
template <class T, int D, int ROWS>
__device__ __forceinline__ void start_scores(float (&s)[ROWS / 8][4], const T* left, const T* right) {
  const uint64_t a = describe(left, 0), b = describe(right, 0);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    const int tile = k / 4 * kTileColumns, column = k % 4 * 16;
    start_product<T, ROWS>(s, advance(a, tile * kRows + column), advance(b, tile * ROWS + column), k > 0);
  }
}

// c (64, D) += p (64, STEP) right (STEP, D), p as `round_scores` makes it.
template <class T, int D, int STEP>
__device__ __forceinline__ void start_sums(float (&c)[D / 8][4], const uint32_t (&p)[STEP / 16][4], const T* right) {
  const uint64_t b = describe(right, STEP * kTileColumns * 2);
#pragma unroll
  for (int k = 0; k < STEP / 16; ++k) start_product<T, D>(c, p[k], advance(b, k * 16 * kTileColumns));
}

// Where the sums of part `part` of dqkv over the 64 rows at hand go; null without a bias, and for rows that no sequence
// has.
__device__ __forceinline__ float* partial_of(float* partial, const OwnedRows& own, const AttentionBatch& batch,
                                             int part) {
  const int block = own.row / kRows;
  if (partial == nullptr || block >= batch.blocks) return nullptr;
  return partial + ((own.sequence * batch.blocks + block) * 3 + part) * batch.heads * batch.dim + own.head * batch.dim;
}

__device__ __forceinline__ void zero_sums(float* sums, int dim, const Team& team) {
  for (int d = team.thread; d < dim; d += team.threads) sums[d] = 0.0f;
}

// What is known of the 64 queries at hand, (3, 64) of (B, N, blocks, 3, 64).
__device__ __forceinline__ float* statistics_of(float* statistics, const OwnedRows& own, const AttentionBatch& batch) {
  const int64_t head = own.sequence * batch.heads + own.head;
  return statistics + (head * batch.blocks + own.row / kRows) * 3 * kRows;
}

// How the rows of every sequence are dealt out: two passes a piece where its other side fits the rings.
template <class Memory>
inline HopperWork plan_work(const AttentionBatch& batch) {
  const bool fits = ceil_div(batch.max_seqlen, Memory::kStep) <= Memory::kStages;
  const int passes = fits && batch.max_seqlen > kTeamRows ? 2 : 1;
  const int blocks = static_cast<int>(ceil_div(batch.max_seqlen, passes * kTeamRows));
  return {static_cast<int>(batch.sequences) * batch.heads * blocks, blocks, passes};
}

inline dim3 grid_of(const HopperWork& work, const Tensor& on) {
  return dim3(static_cast<unsigned>(std::min(work.pieces, multiprocessors_of(on))));
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
  return map_tensor(qkv, {batch.total, 3, batch.heads, batch.dim}, {batch.stride_t, batch.stride_part, batch.stride_n});
}

// x (T, N, D).
template <class T>
inline TensorMap map_rows(const T* x, const AttentionBatch& batch) {
  const int64_t width = int64_t{batch.heads} * batch.dim;
  return map_tensor(x, {batch.total, 1, batch.heads, batch.dim}, {width, width, batch.dim});
}

}  // namespace bert_fast
