// The scheduler of the emulated GPU: runs one block at a time, with its threads as cooperatively scheduled fibers.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/scheduler.h"

namespace emulator {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kBarriers = 16;

struct Copy {
  void* to;
  std::vector<unsigned char> bytes;
};

struct Fiber {
  Index index;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  const unsigned* waits_for = nullptr;  // a generation that has to change from `seen`
  unsigned seen = 0;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies, oldest first; the last is open
};

struct Warp {
  unsigned arrived = 0, generation = 0;
  const char* kind = nullptr;
  alignas(16) unsigned char payload[2][kWarp * kPayload];
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
  unsigned expected = 0;      // 0: all threads that still run
  std::bitset<1024> members;  // that have arrived
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::array<Barrier, kBarriers> barriers;
  unsigned running = 0;
};

Block block;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;
std::exception_ptr failure;
alignas(1024) unsigned char shared[kShared];
uint32_t shuffle_state = 1;

[[noreturn]] void back_to_scheduler() {
  _longjmp(scheduler, 1);
}

// Suspends this fiber until the scheduler resumes it.
void yield() {
  if (_setjmp(current->resume) == 0) back_to_scheduler();
}

void release(Barrier& barrier) {
  barrier.arrived = 0;
  barrier.expected = 0;
  barrier.members.reset();
  ++barrier.generation;
}

// Whether the barrier is complete with this thread, and open for its next phase.
bool arrive(Barrier& barrier, unsigned count) {
  const unsigned thread = current->index.thread.x;
  if (barrier.arrived && barrier.expected != count) throw std::runtime_error("threads disagree on a barrier's count");
  if (barrier.members.test(thread)) throw std::runtime_error("a thread arrived twice at an incomplete barrier");
  barrier.members.set(thread);
  barrier.expected = count;
  if (++barrier.arrived < (count ? count : block.running)) return false;
  release(barrier);
  return true;
}

void leave() {
  current->done = true;
  --block.running;
  // Barriers of the whole block wait only for threads that still run.
  for (Barrier& barrier : block.barriers) {
    if (barrier.arrived && barrier.expected == 0 && barrier.arrived == block.running) release(barrier);
  }
}

void fiber_main() {
  try {
    (*kernel)();
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  leave();
  back_to_scheduler();
}

void switch_to(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
  }
}

std::string stuck() {
  std::string message = "emulated kernel: no thread of the block can continue; waiting:";
  int named = 0;
  for (const auto& fiber : block.fibers) {
    if (!fiber->done && named++ < 8) message += " " + std::to_string(fiber->index.thread.x);
  }
  return message + (named > 8 ? " and " + std::to_string(named - 8) + " more" : "");
}

void run_block(unsigned threads) {
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  while (block.running) {
    for (unsigned i = threads - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
    bool progress = land_copies(false);
    for (unsigned i : order) {
      Fiber& fiber = *block.fibers[i];
      if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
      fiber.waits_for = nullptr;
      progress = true;
      switch_to(fiber);
      if (failure) std::rethrow_exception(failure);
    }
    if (!progress && !land_copies(true)) throw std::runtime_error(stuck());
  }
  for (const Barrier& barrier : block.barriers) {
    if (barrier.arrived) throw std::runtime_error("the block ended with an incomplete barrier");
  }
  end_block();
}

}  // namespace

void wait_on(const unsigned* generation, unsigned seen) {
  current->waits_for = generation;
  current->seen = seen;
  yield();
}

uint32_t next_random() {
  shuffle_state = shuffle_state * 1664525u + 1013904223u;
  return shuffle_state >> 8;
}

int capability() {
  const char* capability = std::getenv("BERT_FAST_EMULATED_CAPABILITY");
  return capability == nullptr ? 80 : std::atoi(capability);
}

const Index& index() {
  return current->index;
}

void* shared_memory() {
  return shared;
}

void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_kernel;
  const std::lock_guard<std::mutex> lock(one_kernel);
  if (threads == 0 || threads > 1024 || threads % kWarp)
    throw std::runtime_error("threads of a block: " + std::to_string(threads));
  if (shared_bytes > kShared) throw std::runtime_error("shared memory of a block: " + std::to_string(shared_bytes));
  kernel = &body;
  failure = nullptr;
  while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.warps.assign(threads / kWarp, Warp());
        block.barriers.fill(Barrier());
        block.running = threads;
        std::memset(shared, 0xff, shared_bytes);
        begin_block(threads, shared_bytes);
        for (unsigned i = 0; i < threads; ++i) {
          Fiber& fiber = *block.fibers[i];
          fiber.index = {dim3(i), dim3(x, y, z), dim3(threads), grid};
          fiber.started = fiber.done = false;
          fiber.waits_for = nullptr;
          fiber.groups.assign(1, {});
        }
        run_block(threads);
      }
    }
  }
}

void barrier(int id, int count) {
  Barrier& barrier = block.barriers.at(id);
  const unsigned seen = barrier.generation;
  if (!arrive(barrier, count)) wait_on(&barrier.generation, seen);
}

void barrier_arrive(int id, int count) {
  arrive(block.barriers.at(id), count);
}

const unsigned char* exchange(const char* kind, const void* value, size_t size) {
  Warp& warp = block.warps[current->index.thread.x / kWarp];
  const unsigned seen = warp.generation;
  unsigned char* payload = warp.payload[seen & 1];
  if (size > kPayload) throw std::runtime_error(std::string(kind) + ": payload too large");
  if (warp.arrived == 0) warp.kind = kind;
  if (std::strcmp(warp.kind, kind) != 0) {
    throw std::runtime_error(std::string("lanes of a warp disagree: ") + warp.kind + " and " + kind);
  }
  if (size) std::memcpy(payload + lane() * kPayload, value, size);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait_on(&warp.generation, seen);
  }
  return payload;  // valid until the collective after the next, which every lane has to reach first
}

// Reads the bytes now and writes them at the wait.
void cp_async(void* to, const void* from, size_t bytes) {
  const auto* source = static_cast<const unsigned char*>(from);
  std::vector<unsigned char> copied(bytes);  // zeros without a source
  if (from) copied.assign(source, source + bytes);
  current->groups.back().push_back({to, std::move(copied)});
}

void cp_async_commit() {
  current->groups.emplace_back();
}

void cp_async_wait(int groups_left) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) - 1 > groups_left) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    groups.erase(groups.begin());
  }
}

}  // namespace emulator
