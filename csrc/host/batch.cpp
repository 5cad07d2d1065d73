// Packs examples into batches and masks the words of a batch.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/philox.h"
#include "host/host.h"
#include "host/views.h"

namespace bert_fast::host {
namespace {

constexpr uint8_t kContinuation = 1, kSpecial = 2;
constexpr int32_t kContinues = 1 << 30;  // set in a token of a shard that continues the word of the token before it
constexpr int64_t kIgnore = -100;

struct Masking {
  View<uint8_t> kinds;         // by token id: bits of kContinuation, kSpecial
  View<int32_t> replacements;  // the ids of random replacements
  int64_t cls, sep, mask;
  int64_t select_threshold, mask_threshold, random_threshold;  // in units of 2^-32
  bool whole_words;
  View<int64_t> span_thresholds;  // in units of 2^-32: each that the random number reaches adds a word to a span
};

int64_t integer(const py::object& masking, const char* name, int64_t low, int64_t high) {
  const int64_t value = masking.attr(name).cast<int64_t>();
  if (value < low || value > high) {
    throw py::value_error("masking." + std::string(name) + " is " + std::to_string(value) + "; expected " +
                          std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

Masking read_masking(const py::object& object, const py::array& kinds, const py::array& replacements,
                     const py::array& span_thresholds) {
  constexpr int64_t one = int64_t{1} << 32;
  const auto table = view<uint8_t>(kinds, "masking.kinds");
  const auto random_ids = view<int32_t>(replacements, "masking.replacements");
  if (random_ids.size == 0) {
    throw py::value_error("masking.replacements is empty; expected the ids of random replacements");
  }
  for (int64_t i = 0; i < random_ids.size; ++i) {
    if (random_ids[i] < 0 || random_ids[i] >= table.size) {
      throw py::value_error("masking.replacements has id " + std::to_string(random_ids[i]) + "; expected 0 to " +
                            std::to_string(table.size - 1));
    }
  }
  const auto spans = view<int64_t>(span_thresholds, "masking.span_thresholds");
  for (int64_t i = 0; i < spans.size; ++i) {
    if (spans[i] < (i == 0 ? 0 : spans[i - 1]) || spans[i] > one) {
      throw py::value_error("masking.span_thresholds element " + std::to_string(i) + " is " + std::to_string(spans[i]) +
                            "; expected 0 to 4294967296 in non-decreasing order");
    }
  }
  const int64_t masked = integer(object, "mask_threshold", 0, one);
  return {table,
          random_ids,
          integer(object, "cls_id", 0, table.size - 1),
          integer(object, "sep_id", 0, table.size - 1),
          integer(object, "mask_id", 0, table.size - 1),
          integer(object, "select_threshold", 1, one),
          masked,
          integer(object, "random_threshold", masked, one),
          object.attr("whole_words").cast<bool>(),
          spans};
}

struct Word {
  int32_t start, length;
  bool taken;
};

class BatchBuilder {
 public:
  BatchBuilder(const Masking& masking, std::array<uint32_t, 2> key, int64_t* input_ids, int64_t* types,
               int64_t* positions, int64_t* labels)
      : masking_(masking), key_(key), input_ids_(input_ids), types_(types), positions_(positions), labels_(labels) {}

  // Writes one example at the cursor and advances it.
  void add(const int32_t* tokens, int32_t a_length, int32_t b_length, uint64_t index) {
    begin_ = cursor_;
    words_.clear();
    candidates_ = 0;
    put(masking_.cls, 0);
    text(tokens, a_length, 0);
    put(masking_.sep, 0);
    if (b_length > 0) {
      text(tokens + a_length, b_length, 1);
      put(masking_.sep, 1);
    }
    mask(index);
  }

 private:
  void put(int64_t id, int64_t type) {
    input_ids_[cursor_] = id;
    types_[cursor_] = type;
    positions_[cursor_] = cursor_ - begin_;
    labels_[cursor_] = kIgnore;
    ++cursor_;
  }

  void text(const int32_t* tokens, int32_t length, int64_t type) {
    bool in_word = false;
    for (int32_t i = 0; i < length; ++i) {
      const int32_t id = tokens[i] & ~kContinues;
      const uint8_t kind = masking_.kinds[id];
      const bool continues = (kind & kContinuation) || (tokens[i] & kContinues);
      if (kind & kSpecial) {
        in_word = false;
      } else {
        ++candidates_;
        if (in_word && masking_.whole_words && continues) {
          ++words_.back().length;
        } else {
          words_.push_back({static_cast<int32_t>(cursor_ - begin_), 1, false});
        }
        in_word = true;
      }
      put(id, type);
    }
  }

  void mask(uint64_t index) {
    if (words_.empty()) {
      return;
    }
    const auto low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
    order_.resize(words_.size());
    for (size_t w = 0; w < words_.size(); w += 4) {
      const auto random = philox4x32<10>({static_cast<uint32_t>(w / 4), low, high, kWords}, key_);
      for (size_t i = w; i < std::min(w + 4, words_.size()); ++i) {
        order_[i] = uint64_t{random[i - w]} << 32 | i;  // a random key, then the index of the word: a total order
      }
    }
    std::sort(order_.begin(), order_.end());
    int64_t left = std::max<int64_t>(1, (candidates_ * masking_.select_threshold + (int64_t{1} << 31)) >> 32);
    bool none = true;
    for (const uint64_t key : order_) {
      const auto first = static_cast<uint32_t>(key);
      if (!words_[first].taken && words_[first].length <= left) {
        left -= span(first, left, low, high);
        none = false;
      }
      if (left == 0) {
        break;
      }
    }
    if (none) {
      // Every word is longer than the budget: mask a shortest one, so that each example has a target.
      const auto shorter = [this](uint64_t x, uint64_t y) {
        return words_[static_cast<uint32_t>(x)].length < words_[static_cast<uint32_t>(y)].length;
      };
      const auto shortest = static_cast<uint32_t>(*std::min_element(order_.begin(), order_.end(), shorter));
      replace(words_[shortest], shortest, low, high);
    }
  }

  // Masks a span of adjacent words from `first` on, of random length but of words that are not masked yet and of at
  // most `left` tokens; returns the number of tokens.
  int64_t span(uint32_t first, int64_t left, uint32_t low, uint32_t high) {
    int64_t words = 1;
    if (masking_.span_thresholds.size > 0) {
      const uint32_t random = philox4x32<10>({first / 4, low, high, kSpans}, key_)[first % 4];
      const auto* thresholds = masking_.span_thresholds.data;
      words += std::upper_bound(thresholds, thresholds + masking_.span_thresholds.size, int64_t{random}) - thresholds;
    }
    int64_t used = 0, position = words_[first].start;
    for (size_t w = first; w < words_.size() && words > 0; ++w, --words) {
      Word& word = words_[w];
      if (word.taken || word.start != position || used + word.length > left) {
        break;
      }
      replace(word, first, low, high);
      used += word.length;
      position += word.length;
    }
    return used;
  }

  // Makes a word of the span that begins at word `first` a target. The tokens of a span are all replaced by [MASK], all
  // replaced by random ids, or all kept; without spans this is decided for each token.
  void replace(Word& word, uint32_t first, uint32_t low, uint32_t high) {
    word.taken = true;
    const bool shared = masking_.span_thresholds.size > 0;
    uint32_t span_choice = 0;
    if (shared) {
      span_choice = philox4x32<10>({static_cast<uint32_t>(words_[first].start), low, high, kReplace}, key_)[0];
    }
    for (int32_t position = word.start; position < word.start + word.length; ++position) {
      const auto random = philox4x32<10>({static_cast<uint32_t>(position), low, high, kReplace}, key_);
      const uint32_t choice = shared ? span_choice : random[0];
      int64_t& id = input_ids_[begin_ + position];
      labels_[begin_ + position] = id;
      if (choice < masking_.mask_threshold) {
        id = masking_.mask;
      } else if (choice < masking_.random_threshold) {
        id = masking_.replacements[below(random[1], masking_.replacements.size)];
      }
    }
  }

  const Masking& masking_;
  std::array<uint32_t, 2> key_;
  int64_t *input_ids_, *types_, *positions_, *labels_;
  int64_t cursor_ = 0, begin_ = 0, candidates_ = 0;
  std::vector<Word> words_;  // in the order of the text
  std::vector<uint64_t> order_;
};

// Checks lengths and ids, fills cu_seqlens; returns the longest sequence.
int64_t measure(View<int32_t> tokens, View<int32_t> a_lengths, View<int32_t> b_lengths, int64_t vocab,
                std::vector<int64_t>& offsets) {
  int64_t used = 0, longest = 0;
  for (int64_t i = 0; i < a_lengths.size; ++i) {
    if (a_lengths[i] < 1 || b_lengths[i] < 0) {
      throw py::value_error("example " + std::to_string(i) + " has lengths (" + std::to_string(a_lengths[i]) + ", " +
                            std::to_string(b_lengths[i]) + "); expected A of 1 or more and B of 0 or more tokens");
    }
    const int64_t length = int64_t{a_lengths[i]} + b_lengths[i];
    used += length;
    const int64_t with_special = length + (b_lengths[i] > 0 ? 3 : 2);
    offsets[i + 1] = offsets[i] + with_special;
    longest = std::max(longest, with_special);
  }
  if (used != tokens.size) {
    throw py::value_error("a_lengths and b_lengths add up to " + std::to_string(used) + "; expected the " +
                          std::to_string(tokens.size) + " elements of tokens");
  }
  if (offsets.back() > std::numeric_limits<int32_t>::max()) {
    throw py::value_error("the batch has " + std::to_string(offsets.back()) + " tokens; expected less than 2^31");
  }
  for (int64_t i = 0; i < tokens.size; ++i) {
    const int32_t id = tokens[i] < 0 ? tokens[i] : tokens[i] & ~kContinues;
    if (id < 0 || id >= vocab) {
      throw py::value_error("tokens element " + std::to_string(i) + " is id " + std::to_string(id) +
                            "; expected 0 to " + std::to_string(vocab - 1) + " as in masking.kinds");
    }
  }
  return longest;
}

}  // namespace

py::array_t<int64_t> pack(const py::array& lengths, int64_t token_budget) {
  const auto sizes = view<int32_t>(lengths, "lengths");
  std::vector<int64_t> starts{0};
  {
    py::gil_scoped_release released;
    int64_t filled = 0;
    for (int64_t i = 0; i < sizes.size; ++i) {
      if (sizes[i] < 1 || sizes[i] > token_budget) {
        throw py::value_error("lengths element " + std::to_string(i) + " is " + std::to_string(sizes[i]) +
                              "; expected 1 to the token budget, " + std::to_string(token_budget));
      }
      if (filled + sizes[i] > token_budget) {
        starts.push_back(i);
        filled = 0;
      }
      filled += sizes[i];
    }
    if (sizes.size > 0) {
      starts.push_back(sizes.size);
    }
  }
  return py::array_t<int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data());
}

py::tuple build_batch(const py::array& tokens, const py::array& a_lengths, const py::array& b_lengths,
                      const py::array& indices, const py::array& key, const py::object& masking) {
  const auto text = view<int32_t>(tokens, "tokens");
  const auto a = view<int32_t>(a_lengths, "a_lengths");
  const auto b = view<int32_t>(b_lengths, "b_lengths", a.size);
  const auto index = view<int64_t>(indices, "indices", a.size);
  const auto key_words = view<uint32_t>(key, "key", 2);
  const py::array kinds = masking.attr("kinds"), replacements = masking.attr("replacements"),
                  spans = masking.attr("span_thresholds");
  const Masking settings = read_masking(masking, kinds, replacements, spans);
  std::vector<int64_t> offsets(a.size + 1, 0);
  const int64_t max_seqlen = measure(text, a, b, settings.kinds.size, offsets);
  py::array_t<int64_t> input_ids(offsets.back()), types(offsets.back()), positions(offsets.back()),
      labels(offsets.back());
  py::array_t<int32_t> cu_seqlens(a.size + 1);
  std::copy(offsets.begin(), offsets.end(), cu_seqlens.mutable_data());
  BatchBuilder builder(settings, {key_words[0], key_words[1]}, input_ids.mutable_data(), types.mutable_data(),
                       positions.mutable_data(), labels.mutable_data());
  {
    py::gil_scoped_release released;
    const int32_t* next = text.data;
    for (int64_t i = 0; i < a.size; ++i) {
      builder.add(next, a[i], b[i], static_cast<uint64_t>(index[i]));
      next += a[i] + b[i];
    }
  }
  return py::make_tuple(input_ids, types, positions, cu_seqlens, labels, max_seqlen);
}

}  // namespace bert_fast::host
