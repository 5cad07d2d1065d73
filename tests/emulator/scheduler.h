// The interface between the scheduler of threads and blocks (emulator.cpp) and Hopper's instructions (hopper.cpp).
#pragma once

#include "emulator/cuda.h"

namespace emulator {

constexpr size_t kShared = 227 << 10;  // the shared memory of a block on Hopper

// Suspends the running thread until `*generation` differs from `seen`.
void wait_on(const unsigned* generation, unsigned seen);
uint32_t next_random();

void begin_block(unsigned threads, size_t shared_bytes);
// Completes a random number of bulk copies, but at least one if `stuck`. Returns whether any completed.
bool land_copies(bool stuck);
// Throws std::runtime_error if a copy or a wgmma was never waited for.
void end_block();

}  // namespace emulator
