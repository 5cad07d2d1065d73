// An output computed in blocks that threads take from one queue. Neither a block's size nor the thread that computes it
// may change what comes out.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/tensor.h"

namespace bert_fast {

constexpr int64_t kBlockRows = 252;     // the sums of a block, with the panels that they need, fit the L2 cache
constexpr int64_t kBlocksOfThread = 4;  // at least, so that no thread waits long for another
constexpr int64_t kFewestRows = 48;     // a block's, beneath which it reads its panels for too little

// What an instruction set asks for: columns of a panel, rows of a tile, columns of a block.
struct TileLayout {
  int64_t panel, tile_rows, block_columns;
};

inline int64_t parts(int64_t size, int64_t part) {
  return (size + part - 1) / part;
}

struct Block {
  int64_t row, col, rows, cols;
  int64_t next_col;  // of the block that this thread takes next where all are as fast, `col` after the last
};

struct Blocks {
  Blocks(int64_t out_rows, int64_t out_cols, const TileLayout& layout)
      : out_rows(out_rows),
        out_cols(out_cols),
        columns(layout.block_columns),
        across(parts(out_cols, layout.block_columns)) {
    const int64_t wanted = kBlocksOfThread * torch::stable::get_num_threads();
    const int64_t for_threads = std::min(parts(wanted, std::max<int64_t>(1, across)), out_rows / kFewestRows);
    const int64_t about = std::max<int64_t>({1, parts(out_rows, kBlockRows), for_threads});
    rows = std::max<int64_t>(1, parts(parts(out_rows, about), layout.tile_rows)) * layout.tile_rows;
    count = parts(out_rows, rows) * across;
  }

  // Every thread calls `start()`, which gives it what computes a block: f(block).
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
