// Reads masks' counts from standard input, parses and draws them in buffers of exactly the right size, and prints what
// was found, for a build with a sanitizer (test_rle_fuzz.py). Each record: int64 height, width, length; then the text.

#include <cstdio>
#include <vector>

#include "rle.h"

namespace rle = sam2fast::rle;

namespace {

int64_t count_bits(const std::vector<uint8_t>& bits) {
  int64_t count = 0;
  for (const uint8_t byte : bits) count += __builtin_popcount(byte);
  return count;
}

// Draws, expands, and returns the number of pixels, -1 where bits and bytes disagree.
template <typename Draw>
int64_t draw(int64_t rows, int64_t columns, const Draw& run) {
  std::vector<uint8_t> bits(static_cast<size_t>(rows * ((columns + 7) / 8)), 0xAA);
  std::vector<uint8_t> bytes(static_cast<size_t>(rows * columns), 0xAA);
  rle::Canvas canvas(bits.data(), rows, columns);
  run(canvas);
  canvas.finish();
  canvas.expand(bytes.data());
  int64_t count = 0;
  for (const uint8_t byte : bytes) count += byte == 1 ? 1 : byte == 0 ? 0 : INT32_MIN;
  return count == count_bits(bits) ? count : -1;
}

}  // namespace

int main() {
  int64_t head[3];
  for (int64_t number = 0; std::fread(head, sizeof(head), 1, stdin) == 1; ++number) {
    const auto [height, width, length] = head;
    // On the heap and of exactly this size, so that the sanitizer sees a read behind it.
    const std::vector<uint8_t> text = [&] {
      std::vector<uint8_t> read(static_cast<size_t>(length));
      return length == 0 || std::fread(read.data(), read.size(), 1, stdin) == 1 ? read : std::vector<uint8_t>{};
    }();
    std::vector<int64_t> ends(text.size());
    const rle::Parsed found = rle::parse(rle::TextReader(text), height * width, ends.data());
    const std::span<const int64_t> runs(ends.data(), static_cast<size_t>(found.runs));
    const int64_t whole = draw(height, width, [&](rle::Canvas& canvas) { rle::draw(runs, height, canvas); });
    // A place that changes from record to record.
    const int64_t side = 1 + number % 37, top = number % height, left = number / 3 % width;
    const int64_t to_top = number / 5 % side, to_left = number / 7 % side;
    const rle::Axis rows(height - top, side - to_top), columns(width - left, side - to_left);
    const int64_t part = draw(side, side, [&](rle::Canvas& canvas) {
      rle::Resampler(height, rows, columns, {top, left, to_top, to_left, side, number % 2 == 1}).draw(runs, canvas);
    });
    std::printf("%ld %ld %ld %ld %ld\n", long{found.fault}, long{found.detail}, long{found.area}, long{whole}, long{part});
  }
}
