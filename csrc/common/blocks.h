// An output computed in blocks, which threads take from one queue. The result must depend neither on the size of a
// block nor on the thread that computes it.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "common/tensor.h"

namespace bert_fast {

constexpr int64_t kBlockRows = 252;      // the sums of a block and the panels that they need fit in L2
constexpr int64_t kBlocksPerThread = 4;  // at least, so that no thread waits long for another
constexpr int64_t kMinBlockRows = 48;    // of a block; fewer don't amortize reading its panels

// What an instruction set determines: columns of a panel, rows of a register tile, columns of a block.
struct TileLayout {
  int64_t panel, tile_rows, block_columns;
};

struct AlignedDelete {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

// A thread's scratch memory, from a cache line on: a vector that crosses two lines takes two loads.
inline std::unique_ptr<float[], AlignedDelete> aligned_floats(int64_t count) {
  void* memory = ::operator new[](count * sizeof(float), std::align_val_t{64});
  return std::unique_ptr<float[], AlignedDelete>(static_cast<float*>(memory));
}

inline int64_t parts(int64_t size, int64_t part) {
  return (size + part - 1) / part;
}

struct Block {
  int64_t row, col, rows, cols;
  int64_t next_col;  // of the block that this thread probably computes next; `col` if there is none
};

struct Blocks {
  Blocks(int64_t out_rows, int64_t out_cols, const TileLayout& layout)
      : out_rows(out_rows),
        out_cols(out_cols),
        columns(layout.block_columns),
        across(parts(out_cols, layout.block_columns)) {
    const int64_t min_blocks = kBlocksPerThread * torch::stable::get_num_threads();
    const int64_t for_threads = std::min(parts(min_blocks, std::max<int64_t>(1, across)), out_rows / kMinBlockRows);
    const int64_t row_blocks = std::max<int64_t>({1, parts(out_rows, kBlockRows), for_threads});
    rows = std::max<int64_t>(1, parts(parts(out_rows, row_blocks), layout.tile_rows)) * layout.tile_rows;
    count = parts(out_rows, rows) * across;
  }

  // Every thread calls `start()`, which returns the function that computes a block: f(block).
  template <class Start>
  void run(const Start& start) const {
    const int64_t threads = torch::stable::get_num_threads();
    std::atomic<int64_t> next{0};
    parallel_for(0, count, 1, [&](int64_t, int64_t) {
      auto compute = start();
      for (int64_t i = next++; i < count; i = next++) {
        const int64_t row = i / across * rows, col = i % across * columns, then = i + threads;
        const int64_t next_col = then < count ? then % across * columns : col;
        compute(Block{row, col, std::min(rows, out_rows - row), std::min(columns, out_cols - col), next_col});
      }
    });
  }

  int64_t out_rows, out_cols, rows, columns, across, count;
};

}  // namespace bert_fast
