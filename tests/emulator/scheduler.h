// Between the two halves of the emulator: threads and blocks (emulator.cpp), and what Hopper adds (hopper.cpp).
#pragma once

#include "emulator/cuda.h"

namespace emulator {

constexpr size_t kShared = 227 << 10;  // what a block may have on a Hopper

// Let the others run until `*generation` is no longer `seen`.
void wait_on(const unsigned* generation, unsigned seen);
uint32_t next_random();

void begin_block(unsigned threads, size_t shared_bytes);
// Some bulk copies arrive, or, where no thread can go on, one does. Whether any did.
bool land_copies(bool stuck);
// std::runtime_error where something was never waited for.
void end_block();

}  // namespace emulator
