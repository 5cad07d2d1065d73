// Plans which tokens form which example, in one pass over the unit boundaries, without reading tokens.
//
// The random words of a document's k-th example depend on (key, document, k) alone, so documents are independent: this
// implementation processes them one after the other, the numpy implementation all of them in lockstep.
#include <algorithm>
#include <vector>

#include "common/philox.h"
#include "host/host.h"
#include "host/views.h"

namespace bert_fast::host {
namespace {

struct Example {
  int64_t a_start, b_start;
  int32_t a_length, b_length, document, b_document;
  int8_t label;
};

class Planner {
 public:
  Planner(View<int64_t> ends, View<int64_t> documents, View<uint64_t> unit_texts, View<uint64_t> document_texts,
          View<uint32_t> key, int64_t max_tokens, int64_t short_threshold, bool pairs)
      : ends_(ends),
        documents_(documents),
        unit_texts_(unit_texts),
        document_texts_(document_texts),
        key_{key[0], key[1]},
        max_tokens_(max_tokens),
        short_threshold_(short_threshold),
        pairs_(pairs) {
    if (pairs) {
      find_different();
    }
  }

  std::vector<Example> run() {
    for (int64_t document = 0; document + 1 < documents_.size; ++document) {
      plan_document(document);
    }
    return std::move(examples_);
  }

 private:
  // For each document the next one, cyclically, with another text; there is one.
  void find_different() {
    const int64_t count = document_texts_.size;
    next_different_.resize(count);
    int64_t next = 0;
    while (document_texts_[next] == document_texts_[count - 1]) {
      ++next;
    }
    for (int64_t document = count - 1; document >= 0; --document) {
      const int64_t after = (document + 1) % count;
      if (document_texts_[after] != document_texts_[document]) {
        next = after;
      }
      next_different_[document] = next;
    }
  }

  int64_t skip_equal(int64_t document, int64_t other) const {
    return document_texts_[other] == document_texts_[document] ? next_different_[other] : other;
  }

  int64_t start(int64_t unit) const { return unit == 0 ? 0 : ends_[unit - 1]; }
  // Units that end at or before `position`.
  int64_t ended(int64_t position) const {
    return std::upper_bound(ends_.data, ends_.data + ends_.size, position) - ends_.data;
  }
  int64_t first_reaching(int64_t position) const {
    return std::lower_bound(ends_.data, ends_.data + ends_.size, position) - ends_.data;
  }

  void plan_document(int64_t document) {
    const int64_t first = documents_[document], last = documents_[document + 1];
    int64_t unit = first;
    for (uint32_t step = 0; unit < last; ++step) {
      draw(document, step);
      int64_t target = max_tokens_;
      if (random_[0] < short_threshold_) {
        target = 2 + below(random_[1], max_tokens_ - 1);
      }
      const int64_t fewest = pairs_ ? 2 : 1;
      const int64_t fit = std::max(ended(start(unit) + target), unit + fewest);
      const int64_t end = std::min(fit, last);
      unit = pairs_ ? pair(document, first, unit, end) : single(document, unit, end);
    }
  }

  void draw(int64_t document, uint32_t step) {
    for (uint32_t block = 0; block < 2; ++block) {
      const auto words = philox4x32<10>({2 * step + block, static_cast<uint32_t>(document),
                                         static_cast<uint32_t>(static_cast<uint64_t>(document) >> 32), kPlan},
                                        key_);
      std::copy(words.begin(), words.end(), random_ + 4 * block);
    }
  }

  int64_t single(int64_t document, int64_t unit, int64_t end) {
    emit(document, start(unit), start(end) - start(unit), -1, 0, 0, -100);
    return end;
  }

  // Adds the example of the units [unit, end) of a document that starts at unit `first`; returns the next unit to use.
  int64_t pair(int64_t document, int64_t first, int64_t unit, int64_t end) {
    const bool is_next = (random_[2] >> 31) == 0;
    int64_t a_unit = unit, split = end, next = end;
    int64_t b_target = start(end) - start(unit);
    if (end - unit >= 2) {
      split = unit + 1 + below(random_[3], end - unit - 1);
      b_target = start(end) - start(split);
    } else if (unit > first) {
      // A single sentence remains: it is paired with the sentence before it.
      if (is_next) {
        a_unit = unit - 1;
        split = unit;
      } else {
        b_target = start(unit) - start(unit - 1);
      }
    }
    const int64_t a_length = start(split) - start(a_unit);
    const int64_t continuation = split < end ? split : -1;
    if ((is_next && split < end) || !random_pair(document, start(a_unit), a_length, b_target, continuation)) {
      emit(document, start(a_unit), a_length, document, start(split), start(end) - start(split), 0);
      return next;
    }
    return split;
  }

  // Adds a pair with a random B that doesn't begin with the text of unit `continuation` (-1 for none); false if there
  // is no such B.
  bool random_pair(int64_t document, int64_t a_start, int64_t a_length, int64_t b_target, int64_t continuation) {
    int64_t other = below(random_[4], documents_.size - 2);
    other = skip_equal(document, other + (other >= document));
    int64_t unit = documents_[other] + below(random_[5], documents_[other + 1] - documents_[other]);
    if (continuation >= 0 && !other_text(document, unit_texts_[continuation], other, unit)) {
      return false;
    }
    const int64_t last = documents_[other + 1];
    const int64_t b_capacity = max_tokens_ - a_length;
    const int64_t end = std::min({first_reaching(start(unit) + b_target) + 1, ended(start(unit) + b_capacity), last});
    const int64_t b_length = end > unit ? start(end) - start(unit) : b_capacity;
    emit(document, a_start, a_length, other, start(unit), b_length, 1);
    return true;
  }

  // Moves to the first unit from `unit` of document `other`, cyclically, and then of the documents after it, whose text
  // is not `text`; false if there is none.
  bool other_text(int64_t document, uint64_t text, int64_t& other, int64_t& unit) const {
    const int64_t first = other;
    while (true) {
      const int64_t begin = documents_[other], count = documents_[other + 1] - begin;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t place = begin + (unit - begin + i) % count;
        if (unit_texts_[place] != text) {
          unit = place;
          return true;
        }
      }
      other = skip_equal(document, (other + 1) % document_texts_.size);
      if (other == first) {
        return false;
      }
      unit = documents_[other];
    }
  }

  void emit(int64_t document, int64_t a_start, int64_t a_length, int64_t b_document, int64_t b_start, int64_t b_length,
            int label) {
    examples_.push_back({a_start, b_start, static_cast<int32_t>(a_length), static_cast<int32_t>(b_length),
                         static_cast<int32_t>(document), static_cast<int32_t>(b_document), static_cast<int8_t>(label)});
  }

  View<int64_t> ends_, documents_;
  View<uint64_t> unit_texts_, document_texts_;
  std::vector<int64_t> next_different_;
  std::array<uint32_t, 2> key_;
  int64_t max_tokens_, short_threshold_;
  bool pairs_;
  uint32_t random_[8] = {};
  std::vector<Example> examples_;
};

void check(View<int64_t> ends, View<int64_t> documents, View<uint64_t> texts, int64_t max_tokens,
           int64_t short_threshold, bool pairs) {
  if (max_tokens < 2 || max_tokens > INT32_MAX) {
    throw py::value_error("max_tokens is " + std::to_string(max_tokens) + "; expected 2 to 2^31 - 1");
  }
  if (short_threshold < 0 || short_threshold > (int64_t{1} << 32)) {
    throw py::value_error("short_threshold is " + std::to_string(short_threshold) + "; expected 0 to 2^32");
  }
  if (documents.size < (pairs ? 3 : 1) || documents.size > INT32_MAX) {
    throw py::value_error("document_units has " + std::to_string(documents.size - 1) +
                          " documents; sentence pairs need at least 2");
  }
  if (documents[0] != 0 || documents[documents.size - 1] != ends.size) {
    throw py::value_error("document_units must start at 0 and end at the number of units, " +
                          std::to_string(ends.size));
  }
  for (int64_t i = 1; i < documents.size; ++i) {
    if (documents[i] <= documents[i - 1]) {
      throw py::value_error("document_units does not increase at element " + std::to_string(i));
    }
  }
  const int64_t limit = pairs ? max_tokens / 2 : max_tokens;
  for (int64_t i = 0; i < ends.size; ++i) {
    const int64_t before = i == 0 ? 0 : ends[i - 1];
    if (ends[i] <= before || ends[i] - before > limit) {
      throw py::value_error("unit_ends element " + std::to_string(i) + " makes a unit of " +
                            std::to_string(ends[i] - before) + " tokens; expected 1 to " + std::to_string(limit));
    }
  }
  const auto* texts_end = texts.data + texts.size;
  if (pairs && std::all_of(texts.data, texts_end, [&](uint64_t text) { return text == texts[0]; })) {
    throw py::value_error("the " + std::to_string(texts.size) +
                          " documents have equal texts; sentence pairs need 2 different ones");
  }
}

template <typename T, typename Member>
py::array_t<T> column(const std::vector<Example>& examples, Member member) {
  py::array_t<T> values(static_cast<py::ssize_t>(examples.size()));
  std::transform(examples.begin(), examples.end(), values.mutable_data(),
                 [member](const Example& example) { return example.*member; });
  return values;
}

}  // namespace

py::tuple plan(const py::array& unit_ends, const py::array& document_units, const py::array& unit_texts,
               const py::array& document_texts, const py::array& key, int64_t max_tokens, int64_t short_threshold,
               bool pairs) {
  const auto ends = view<int64_t>(unit_ends, "unit_ends");
  const auto documents = view<int64_t>(document_units, "document_units");
  const auto key_words = view<uint32_t>(key, "key", 2);
  const auto texts = view<uint64_t>(unit_texts, "unit_texts", ends.size);
  const auto whole_texts = view<uint64_t>(document_texts, "document_texts", std::max<int64_t>(documents.size - 1, 0));
  std::vector<Example> examples;
  {
    py::gil_scoped_release released;
    check(ends, documents, whole_texts, max_tokens, short_threshold, pairs);
    examples = Planner(ends, documents, texts, whole_texts, key_words, max_tokens, short_threshold, pairs).run();
  }
  return py::make_tuple(column<int64_t>(examples, &Example::a_start), column<int32_t>(examples, &Example::a_length),
                        column<int64_t>(examples, &Example::b_start), column<int32_t>(examples, &Example::b_length),
                        column<int8_t>(examples, &Example::label), column<int32_t>(examples, &Example::document),
                        column<int32_t>(examples, &Example::b_document));
}

}  // namespace bert_fast::host
