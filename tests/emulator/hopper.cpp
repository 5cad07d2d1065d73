// mbarriers, bulk copies and wgmma: their state, and when their results become visible.
#include "emulator/hopper.h"

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/scheduler.h"

namespace emulator {
namespace {

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // expected and not delivered yet
  unsigned generation = 0;
};

struct Copy {
  void* barrier;
  int bytes;
  std::function<void()> land;
};

// An operand in shared memory, as it was when the product started.
struct Operand {
  uint64_t descriptor;
  int rows;
  bool transposed;
  std::vector<uint16_t> numbers;  // (rows, 16)
};

struct Product {
  int group;
  float* c;
  std::vector<float> result;
  std::vector<Operand> operands;  // in lane 0 alone
};

struct Thread {
  int group = 0;  // the open one
  bool fenced = false;
  std::vector<Product> products;
  // The shared-memory operands of the warp's current product, (64, 16) and (n, 16), in lane 0.
  std::vector<float> left, right;
  unsigned started = 0, read = 0;
};

std::map<const void*, Mbarrier> mbarriers;
std::vector<Copy> copies;
std::vector<Thread> threads;
size_t shared_size = 0;
// Shared memory as the async proxy (TMA and wgmma) sees it.
unsigned char async_view[kShared];

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error("emulated kernel: " + message);
}

unsigned char* shared_bytes() {
  return static_cast<unsigned char*>(shared_memory());
}

Mbarrier& find(const void* barrier) {
  const auto entry = mbarriers.find(barrier);
  if (entry == mbarriers.end()) fail("an mbarrier was not initialized");
  return entry->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  ++barrier.generation;
}

// A copy's write, visible to threads and to the async proxy.
void write(uint32_t offset, const void* bytes, size_t size) {
  if (offset + size > shared_size) fail("a bulk copy exceeds the shared memory");
  std::memcpy(shared_bytes() + offset, bytes, size);
  std::memcpy(async_view + offset, bytes, size);
}

uint32_t swizzled(uint32_t offset) {
  return offset ^ (offset >> 3 & 0x70);
}

void land(size_t index) {
  const Copy copy = std::move(copies[index]);
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(index));
  copy.land();
  Mbarrier& barrier = find(copy.barrier);
  barrier.bytes -= copy.bytes;
  if (barrier.bytes < 0) fail("a bulk copy delivered more bytes than its mbarrier expects");
  end_phase_if_complete(barrier);
}

void start_copy(void* barrier, int bytes, std::function<void()> landing) {
  find(barrier);
  copies.push_back({barrier, bytes, std::move(landing)});
  if (next_random() % 4 == 0) land(copies.size() - 1);
}

// An operand of `rows` rows (columns if transposed) by the 16 numbers of the summed dimension.
std::vector<uint16_t> read_operand(uint64_t descriptor, int rows, bool transposed) {
  if (descriptor >> 62 != 1) fail("an operand of a wgmma is not in the 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("an operand of a wgmma is not aligned to 1024 bytes");
  const uint32_t start = (descriptor & 0x3fff) << 4, next_columns = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  std::vector<uint16_t> numbers(rows * 16);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      const int along = transposed ? k : row, within = transposed ? row : k;
      const uint32_t offset =
          start + within / 64 * next_columns + along / 8 * eight_rows + along % 8 * 128 + within % 64 * 2;
      if (offset + 2 > shared_size) fail("an operand of a wgmma exceeds the shared memory");
      std::memcpy(&numbers[row * 16 + k], async_view + swizzled(offset), 2);
    }
  }
  return numbers;
}

Thread& this_thread() {
  return threads.at(index().thread.x);
}

struct Operands {
  uint32_t a[4];
  uint64_t left, right;
};

std::vector<float> as_floats(const std::vector<uint16_t>& numbers, float (*number)(uint32_t, int)) {
  std::vector<float> floats;
  floats.reserve(numbers.size());
  for (const uint16_t bits : numbers) floats.push_back(number(bits, 0));
  return floats;
}

// The 16 numbers of rows g and g + 8 of the warp's left operand, from shared memory or, if that is null, its lanes.
void read_left(const unsigned char* lanes, const std::vector<float>* shared, float (*number)(uint32_t, int),
               float (&left)[2][16]) {
  const int g = lane() / 4, warp = index().thread.x / kWarp % 4;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      left[i][k] = shared ? (*shared)[(16 * warp + g + 8 * i) * 16 + k]
                          : number(lane_value<Operands>(lanes, 4 * g + k % 8 / 2).a[k / 8 * 2 + i], k % 2);
    }
  }
}

}  // namespace

uint32_t shared_offset(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_bytes());
}

void begin_block(unsigned count, size_t size) {
  mbarriers.clear();
  copies.clear();
  threads.assign(count, Thread());
  shared_size = size;
  std::memset(async_view, 0xff, size);
}

bool land_copies(bool stuck) {
  if (copies.empty()) return false;
  if (!stuck && next_random() % 8) return false;
  land(next_random() % copies.size());
  return true;
}

void end_block() {
  if (!copies.empty()) fail("the block ended before a bulk copy completed");
  for (const Thread& thread : threads) {
    if (!thread.products.empty()) fail("the block ended before the wait for a wgmma");
  }
}

void mbarrier_init(void* barrier, int count) {
  if (mbarriers.count(barrier)) fail("an mbarrier was initialized twice");
  mbarriers[barrier] = {count, count, 0, 0};
}

void mbarrier_arrive(void* barrier, int expected_bytes) {
  Mbarrier& state = find(barrier);
  if (state.pending == 0) fail("more arrivals at an mbarrier than its count");
  state.bytes += expected_bytes;
  --state.pending;
  end_phase_if_complete(state);
}

void mbarrier_wait(void* barrier, int parity) {
  const Mbarrier& state = find(barrier);
  while (static_cast<int>(state.generation & 1) == parity) wait_on(&state.generation, state.generation);
}

void tma_load_box(void* to, const TensorMap& map, int column, int head, int part, int token, void* barrier) {
  const uint32_t offset = shared_offset(to);
  if (offset % 1024) fail("a tile is not aligned to 1024 bytes");
  start_copy(barrier, 64 * 64 * 2, [=] {
    for (int row = 0; row < 64; ++row) {
      for (int i = 0; i < 64; ++i) {
        uint16_t number = 0;
        const int64_t place[4] = {int64_t{token} + row, part, head, int64_t{column} + i};
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) inside = inside && place[axis] >= 0 && place[axis] < map.sizes[axis];
        if (inside) {
          const int64_t at =
              place[0] * map.strides[0] + place[1] * map.strides[1] + place[2] * map.strides[2] + place[3] * 2;
          std::memcpy(&number, static_cast<const unsigned char*>(map.base) + at, 2);
        }
        write(swizzled(offset + row * 128 + i * 2), &number, 2);
      }
    }
  });
}

void bulk_load(void* to, const void* from, int bytes, void* barrier) {
  const uint32_t offset = shared_offset(to);
  if (offset % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    fail("the addresses and the size of a bulk copy have to be multiples of 16 bytes");
  start_copy(barrier, bytes, [=] { write(offset, from, bytes); });
}

void fence_async_proxy() {
  std::memcpy(async_view, shared_bytes(), shared_size);
}

void wgmma(float* c, int n, const uint32_t* a, uint64_t left, uint64_t right, bool transposed, bool add,
           float (*number)(uint32_t pair, int half)) {
  Operands operands = {{}, left, right};
  if (a) std::memcpy(operands.a, a, sizeof(operands.a));
  const unsigned char* lanes = exchange("wgmma", &operands, sizeof(operands));
  const auto other = lane_value<Operands>(lanes, 0);
  if (other.left != left || other.right != right) fail("lanes of a warp pass different descriptors");
  Thread &self = this_thread(), &first = threads[index().thread.x / kWarp * kWarp];
  if (!self.fenced) fail("a wgmma started without a wgmma.fence after the last wait");
  Product product = {self.group, c, std::vector<float>(c, c + n / 2), {}};
  for (Product& before : self.products) {
    if (before.c == c) product.result = before.result;
  }
  if (first.read == self.started++) {  // the first lane of the warp to arrive here reads for all
    ++first.read;
    first.right = as_floats(read_operand(right, n, transposed), number);
    if (!a) first.left = as_floats(read_operand(left, 64, false), number);
  }
  if (lane() == 0) {
    product.operands.push_back({right, n, transposed, read_operand(right, n, transposed)});
    if (!a) product.operands.push_back({left, 64, false, read_operand(left, 64, false)});
  }
  float row[2][16];
  read_left(lanes, a ? nullptr : &first.left, number, row);
  for (int i = 0; i < n / 2; ++i) {
    const float* column = first.right.data() + (i / 4 * 8 + 2 * (lane() % 4) + i % 2) * 16;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) sum += row[i % 4 / 2][k] * column[k];
    product.result[i] = add ? product.result[i] + sum : sum;
    c[i] = NAN;
  }
  self.products.push_back(std::move(product));
}

void wgmma_fence() {
  exchange("wgmma.fence", nullptr, 0);
  this_thread().fenced = true;
}

void wgmma_commit() {
  ++this_thread().group;
}

void wgmma_wait(int groups_left) {
  exchange("wgmma.wait_group", nullptr, 0);
  Thread& self = this_thread();
  self.fenced = false;
  auto& products = self.products;
  while (!products.empty() && products.front().group < self.group - groups_left) {
    const Product& done = products.front();
    for (const Operand& operand : done.operands) {
      if (read_operand(operand.descriptor, operand.rows, operand.transposed) != operand.numbers)
        fail("an operand of a wgmma changed before its wait");
    }
    bool last = true;
    for (size_t i = 1; i < products.size(); ++i) last = last && products[i].c != done.c;
    if (last) std::copy(done.result.begin(), done.result.end(), done.c);
    products.erase(products.begin());
  }
}

}  // namespace emulator
