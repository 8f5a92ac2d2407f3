// COCO run-length masks: counts to the ends of runs, and ends to bits. Plain memory and no torch, so that a test can
// compile it alone with a sanitizer. Derivation: kernels/rle/README.md; the ground truth of every branch is
// kernels/rle/reference.py.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace sam2fast::rle {

constexpr int kMaxCharacters = 12;

// The same numbers as Fault in kernels/rle/reference.py.
enum Fault : int64_t { kNone, kCharacter, kTruncated, kTooLong, kNegative, kBeyond, kShort };

// What parsing found: a fault and where it is, or the number of runs and of foreground pixels.
struct Parsed {
  Fault fault = kNone;
  int64_t detail = 0, runs = 0, area = 0;
};

struct Number {
  int64_t value;
  Fault fault;
};

// Run lengths as they are written in compressed counts, one after the other.
class TextReader {
 public:
  explicit TextReader(std::span<const uint8_t> text) : next_(text.data()), end_(text.data() + text.size()) {}
  bool done() const { return next_ == end_; }
  Number next() {
    const Number number = read();
    if (number.fault != kNone) return number;
    const int64_t value = number.value + (index_++ > 2 ? before_last_ : 0);
    before_last_ = last_;
    last_ = value;
    return {value, kNone};
  }

 private:
  // 12 characters are 60 bits: value plus a run length fits in int64.
  Number read() {
    if (end_ - next_ >= 2) {
      // Numbers of one or two characters, nearly all, without a branch that nobody could predict.
      const unsigned low = next_[0] - 48u, high = next_[1] - 48u, more = low >> 5 & 1u;
      if (low < 64u && (!more || high < 32u)) {
        const auto value = static_cast<int64_t>((low & 31u) | (more ? high << 5 : 0u));
        const int64_t half = int64_t{16} << 5 * more;
        next_ += 1 + more;
        return {(value ^ half) - half, kNone};  // the highest bit is the sign
      }
    }
    int64_t value = 0;
    int shift = 0;
    unsigned group = 0;
    do {
      if (next_ == end_) return {0, kTruncated};
      group = static_cast<unsigned>(*next_) - 48u;
      if (group >= 64u) return {0, kCharacter};
      if (shift == 5 * kMaxCharacters) return {0, kTooLong};
      value |= static_cast<int64_t>(group & 31u) << shift;
      shift += 5;
      ++next_;
    } while (group & 32u);
    if (group & 16u) value -= int64_t{1} << shift;
    return {value, kNone};
  }

  const uint8_t *next_, *end_;
  int64_t index_ = 0, last_ = 0, before_last_ = 0;
};

// Run lengths as uncompressed counts list them.
class ListReader {
 public:
  explicit ListReader(std::span<const int64_t> lengths)
      : next_(lengths.data()), end_(lengths.data() + lengths.size()) {}
  bool done() const { return next_ == end_; }
  Number next() { return {*next_++, kNone}; }

 private:
  const int64_t *next_, *end_;
};

// Writes the position behind each run of a mask of `pixels` pixels; `ends` has room for all that `reader` can give.
template <typename Reader>
Parsed parse(Reader reader, int64_t pixels, int64_t* ends) {
  int64_t total = 0, index = 0, area = 0;
  for (; !reader.done(); ++index) {
    const auto [value, fault] = reader.next();
    if (fault != kNone) return {fault, index};
    if (value < 0) return {kNegative, index};
    if (value > pixels - total) return {kBeyond, index};
    total += value;
    if (index % 2 == 1) area += value;
    ends[index] = total;
  }
  if (total < pixels) return {kShort, total};
  return {kNone, 0, index, area};
}

// Whether `ends` are what `parse` writes (none for a faulty mask), so that nothing drawn leaves the mask.
inline bool is_valid(std::span<const int64_t> ends, int64_t pixels) {
  return ends.empty() || (ends.front() >= 0 && ends.back() == pixels && std::is_sorted(ends.begin(), ends.end()));
}

// Bits of one mask, 8 pixels to a byte, lowest first. Columns are drawn by the rows at which they change; `finish` makes
// pixels of that, by exclusive-or down the rows.
class Canvas {
 public:
  Canvas(uint8_t* bits, int64_t rows, int64_t columns)
      : bits_(bits), rows_(rows), columns_(columns), stride_((columns + 7) / 8) {
    std::memset(bits_, 0, static_cast<size_t>(rows_ * stride_));
  }

  // Rows behind the last change nothing.
  void change(int64_t row, int64_t column) {
    if (row >= rows_) return;
    const int64_t byte = column / 8;
    bits_[row * stride_ + byte] ^= static_cast<uint8_t>(1u << column % 8);
    first_row_ = std::min(first_row_, row);
    last_row_ = std::max(last_row_, row);
    first_byte_ = std::min(first_byte_, byte);
    last_byte_ = std::max(last_byte_, byte);
  }

  void finish() {
    if (last_row_ < 0) return;
    const int64_t bytes = last_byte_ - first_byte_ + 1;
    uint8_t* above = bits_ + first_row_ * stride_ + first_byte_;
    for (int64_t row = first_row_ + 1; row < rows_; ++row) {
      uint8_t* own = above + stride_;
      // Of different rows, which the compiler cannot know.
#pragma GCC ivdep
      for (int64_t i = 0; i < bytes; ++i) own[i] ^= above[i];
      above = own;
      if (row >= last_row_ && std::all_of(own, own + bytes, [](uint8_t byte) { return byte == 0; })) {
        last_row_ = row;
        return;
      }
    }
    last_row_ = rows_ - 1;
  }

  // The finished bits as one byte a pixel.
  void expand(uint8_t* mask) const {
    if (last_row_ < 0) {
      std::memset(mask, 0, static_cast<size_t>(rows_ * columns_));
      return;
    }
    std::memset(mask, 0, static_cast<size_t>(first_row_ * columns_));
    for (int64_t row = first_row_; row <= last_row_; ++row) expand_row(row, mask + row * columns_);
    std::memset(mask + (last_row_ + 1) * columns_, 0, static_cast<size_t>((rows_ - 1 - last_row_) * columns_));
  }

 private:
  // Bytes of eight pixels, by their bits.
  static constexpr std::array<std::array<uint8_t, 8>, 256> kPixels = [] {
    std::array<std::array<uint8_t, 8>, 256> table{};
    for (size_t bits = 0; bits < 256; ++bits)
      for (size_t i = 0; i < 8; ++i) table[bits][i] = bits >> i & 1;
    return table;
  }();

  void expand_row(int64_t row, uint8_t* pixels) const {
    const uint8_t* bits = bits_ + row * stride_;
    const int64_t whole = std::min(last_byte_ + 1, columns_ / 8);
    std::memset(pixels, 0, static_cast<size_t>(8 * first_byte_));
    for (int64_t byte = first_byte_; byte < whole; ++byte) std::memcpy(pixels + 8 * byte, kPixels[bits[byte]].data(), 8);
    if (last_byte_ < whole) {
      std::memset(pixels + 8 * whole, 0, static_cast<size_t>(columns_ - 8 * whole));
    } else {
      std::memcpy(pixels + 8 * whole, kPixels[bits[whole]].data(), static_cast<size_t>(columns_ - 8 * whole));
    }
  }

  uint8_t* bits_;
  int64_t rows_, columns_, stride_;
  // Of what is not 0.
  int64_t first_row_ = INT64_MAX, last_row_ = -1, first_byte_ = INT64_MAX, last_byte_ = -1;
};

// Draws a whole mask; runs count pixels down the columns of `height`.
inline void draw(std::span<const int64_t> ends, int64_t height, Canvas& canvas) {
  int64_t column = 0, top = 0;  // `top` is the position of the first pixel of `column`
  const auto seek = [&](int64_t position) {
    if (position - top >= 16 * height) {
      column = position / height;
      top = column * height;
    }
    for (; position - top >= height; top += height) ++column;
  };
  for (size_t i = 1; i < ends.size(); i += 2) {
    const int64_t begin = ends[i - 1], end = ends[i];
    if (begin == end) continue;
    seek(begin);
    canvas.change(begin - top, column);
    while (end - top > height) {
      top += height;
      canvas.change(0, ++column);
    }
    canvas.change(end - top, column);
  }
}

// One axis of a bilinear resize of `from` to `to` pixels, in whole numbers: target pixel i lies `fraction[i]` of 2 * to
// behind the center of source pixel `low[i]`, which is -1 before the first.
struct Axis {
  Axis(int64_t from, int64_t to) : from(from), to(to), low(to), fraction(to), first(from + 1, to) {
    int64_t reached = 0;
    for (int64_t i = 0; i < to; ++i) {
      const int64_t place = (2 * i + 1) * from - to;  // of 2 * to
      low[i] = place < 0 ? -1 : place / (2 * to);
      fraction[i] = place - low[i] * 2 * to;
      for (; reached <= low[i]; ++reached) first[reached] = i;
    }
  }
  int64_t from, to;
  std::vector<int64_t> low, fraction;
  std::vector<int64_t> first;  // target pixels that do not lie before the center of a source pixel; `to` if none
};

// Where a part of a mask goes: source pixels from (top, left), target pixels from (to_top, to_left), their numbers those
// of the axes, in a square of `side`, which is mirrored then.
struct Placement {
  int64_t top, left, to_top, to_left, side;
  bool flip;
};

// Draws a part of a mask resized: bilinear interpolation of 0 and 1 that reaches one half.
class Resampler {
 public:
  Resampler(int64_t height, const Axis& rows, const Axis& columns, const Placement& place)
      : height_(height), rows_(rows), columns_(columns), place_(place), runs_(static_cast<size_t>(columns.from)) {}

  void draw(std::span<const int64_t> ends, Canvas& canvas) {
    ends_ = ends;
    size_t run = 0;
    for (int64_t c = 0; c < columns_.from; ++c) {
      const int64_t start = start_of(c);
      if (c == 0) run = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), start) - ends.begin());
      while (run < ends.size() && ends[run] <= start) ++run;
      runs_[static_cast<size_t>(c)] = run;
    }
    int64_t pair = INT64_MIN;
    for (int64_t x = 0; x < columns_.to; ++x) {
      if (columns_.low[x] != pair) compare(pair = columns_.low[x]);
      if (changes_.empty() && first_ == 0) continue;
      const int64_t at = place_.to_left + x;
      draw_column(columns_.fraction[x], place_.flip ? place_.side - 1 - at : at, canvas);
    }
  }

 private:
  // A source column from its first used row on: its value there, and the rows (relative to that) at which it changes.
  struct Column {
    const int64_t *next, *last;
    int64_t start, rows;
    bool value;

    int64_t row() const { return next < last && *next - start < rows ? *next - start : INT64_MAX; }
    void advance(int64_t to) {
      for (; row() == to; ++next) value = !value;
    }
  };

  int64_t start_of(int64_t c) const { return (place_.left + c) * height_ + place_.top; }

  Column column(int64_t c) const {
    const size_t run = runs_[static_cast<size_t>(c)];
    return {ends_.data() + run, ends_.data() + ends_.size(), start_of(c), rows_.from, run % 2 == 1};
  }

  // A source row at which one of two columns changes, as the target rows [begin, end) between it and the row above, and
  // the values of both columns before and after: bit 0 the left, bit 1 the right one.
  struct Change {
    int64_t begin, end;
    int before, after;
  };

  // Finds the changes of source columns c and c + 1; behind a border the column is that of the border.
  void compare(int64_t c) {
    Column left = column(std::max<int64_t>(c, 0)), right = column(std::min(c + 1, columns_.from - 1));
    const auto values = [&] { return int{left.value} + 2 * int{right.value}; };
    changes_.clear();
    first_ = last_ = values();
    while (true) {
      const int64_t row = std::min(left.row(), right.row());
      if (row == INT64_MAX) return;
      left.advance(row);
      right.advance(row);
      changes_.push_back({rows_.first[row - 1], rows_.first[row], last_, values()});
      last_ = values();
    }
  }

  // Between changes both columns are constant, and so is the result. It is monotonic between the rows of a change.
  void draw_column(int64_t fraction, int64_t x, Canvas& canvas) const {
    const int64_t whole = 2 * columns_.to, tall = 2 * rows_.to;
    const int64_t share[4] = {0, whole - fraction, fraction, whole};
    const bool inside[4] = {false, 2 * share[1] >= whole, 2 * share[2] >= whole, true};
    if (inside[first_]) canvas.change(place_.to_top, x);
    for (const auto& [begin, end, before, after] : changes_) {
      if (inside[before] == inside[after]) continue;
      const auto reached = [&](int64_t y) {
        const int64_t below = rows_.fraction[y];
        return (2 * ((tall - below) * share[before] + below * share[after]) >= tall * whole) == inside[after];
      };
      int64_t y = begin;
      while (y < end && !reached(y)) ++y;
      canvas.change(place_.to_top + y, x);
    }
    if (inside[last_]) canvas.change(place_.to_top + rows_.to, x);
  }

  int64_t height_;
  const Axis &rows_, &columns_;
  Placement place_;
  std::span<const int64_t> ends_;
  std::vector<size_t> runs_;  // of the first used pixel of each used column
  // Of the columns last compared: values in the first and in the last row, and what changes between them.
  int first_ = 0, last_ = 0;
  std::vector<Change> changes_;
};

}  // namespace sam2fast::rle
