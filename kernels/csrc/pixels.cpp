// The loops of pixels.h for one instruction set, SAM2FAST_ISA; CMakeLists.txt compiles this file once for each.

#include "pixels.h"

#include <utility>

#include "simd.h"

namespace sam2fast::SAM2FAST_ISA {
namespace {

typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// Pixels go through each step in blocks: what one step stores, the next one reads in other widths, and has left the
// store buffers by then.
constexpr int64_t kBlock = 128;

SAM2FAST_INLINE Float to_float(Int value) { return __builtin_convertvector(value, Float); }
SAM2FAST_INLINE Int to_int(Float value) { return __builtin_convertvector(value, Int); }

template <size_t... kIndex>
SAM2FAST_INLINE Words every_second(Words a, Words b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex)...);
}
template <size_t... kIndex>
SAM2FAST_INLINE Words every_other(Words a, Words b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex + 1)...);
}
constexpr auto kSequence = std::make_index_sequence<kLanes>{};

// Coordinates in 1/256, rounded and clamped to [0, size - 1]; clamped first, so that all fit into int32. Sizes are below
// 2^23, and so the last coordinate is a float32.
SAM2FAST_INLINE Int locate(float start, float step, Float index, int64_t size) {
  const Float last = broadcast(static_cast<float>(size - 1) * 256.0f);
  Float at = (start * 256.0f + 0.5f) + index * (step * 256.0f);
  at = at > 0.0f ? at : Float{};
  return to_int(at < last ? at : last);
}

SAM2FAST_INLINE Float indices(int64_t first) {
  Float index = {};
  for (int i = 0; i < kLanes; ++i) index[i] = static_cast<float>(i);
  return index + static_cast<float>(first);
}

// Of a block of pixels: place in the source, and the weights of the neighbors right, below and diagonal in 1/256; that
// of the pixel itself is the rest.
struct Block {
  alignas(64) int32_t place[kBlock];
  alignas(64) int32_t right[kBlock];
  alignas(64) int32_t below[kBlock];
  alignas(64) int32_t diagonal[kBlock];
};

template <typename Element>
SAM2FAST_INLINE void locate_block(
    const Source<Element>& source, const Line& line, int64_t first, int64_t count, Block& block) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float index = indices(first + i);
    const Int x = locate(line.x, line.dx, index, source.width), y = locate(line.y, line.dy, index, source.height);
    const Int right = x & 255, below = y & 255;
    const auto product = reinterpret_cast<Halves>(right) * reinterpret_cast<Halves>(below) + 128;  // below 2^16
    const Int diagonal = reinterpret_cast<Int>(product) >> 8 & 255;
    store((y >> 8) * static_cast<int32_t>(source.stride) + (x >> 8), block.place + i, kLanes);
    store(right - diagonal, block.right + i, kLanes);
    store(below - diagonal, block.below + i, kLanes);
    store(diagonal, block.diagonal + i, kLanes);
  }
}

void pack(const uint8_t* rgb, int64_t width, uint32_t* words) {
  for (int64_t i = 0; i + 1 < width; ++i) std::memcpy(words + i, rgb + 3 * i, 4);
  const uint8_t* last = rgb + 3 * (width - 1);
  words[width - 1] = last[0] | static_cast<uint32_t>(last[1]) << 8 | static_cast<uint32_t>(last[2]) << 16;
}

SAM2FAST_INLINE Halves twice(Int weight) { return reinterpret_cast<Halves>(weight | weight << 16); }

// Color maps of channels in 1/256, with the 1/2 that rounds.
SAM2FAST_INLINE void scale_colors(const float* color, float (&scaled)[12]) {
  for (int i = 0; i < 12; ++i) scaled[i] = i % 4 == 3 ? color[i] + 0.5f : color[i] * (1.0f / 256.0f);
}

// A block of channels as bytes; apart from `map_channel`, since compilers take vectors apart that are converted one at
// a time.
SAM2FAST_INLINE void narrow(const int32_t (&channels)[3][kBlock], int64_t size, uint8_t* const (&out)[3]) {
  for (int c = 0; c < 3; ++c) {
    for (int64_t i = 0; i < size; ++i) out[c][i] = static_cast<uint8_t>(channels[c][i]);
  }
}

SAM2FAST_INLINE void map_channel(const float* color, Float red, Float green, Float blue, int32_t* out) {
  Float value = red * color[0] + green * color[1] + blue * color[2] + color[3];
  value = value > 0.0f ? value : Float{};
  value = value < 255.0f ? value : broadcast(255.0f);
  store(to_int(value), out, kLanes);
}

void sample(
    const Source<uint32_t>& source, const Line& line, const float* color, int64_t count, uint8_t* red, uint8_t* green,
    uint8_t* blue) {
  Block block;
  alignas(64) uint64_t top[kBlock], bottom[kBlock];
  alignas(64) int32_t channels[3][kBlock];
  float scaled[12];
  scale_colors(color, scaled);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    locate_block(source, line, first, size, block);
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t* pixel = source.data + block.place[i];
      std::memcpy(top + i, pixel, 8);
      std::memcpy(bottom + i, pixel + source.stride, 8);
    }
    for (int64_t i = 0; i < size; i += kLanes) {
      const auto upper_a = load<Words>(top + i), upper_b = load<Words>(top + i + kLanes / 2);
      const auto lower_a = load<Words>(bottom + i), lower_b = load<Words>(bottom + i + kLanes / 2);
      const Words pixels[4] = {
          every_second(upper_a, upper_b, kSequence), every_other(upper_a, upper_b, kSequence),
          every_second(lower_a, lower_b, kSequence), every_other(lower_a, lower_b, kSequence)};
      const Int right = load<Int>(block.right + i), below = load<Int>(block.below + i);
      const Int diagonal = load<Int>(block.diagonal + i);
      const Halves weights[4] = {twice(256 - right - below - diagonal), twice(right), twice(below), twice(diagonal)};
      Halves red_blue = {}, only_green = {};  // sums of at most 255 * 256
      for (int k = 0; k < 4; ++k) {
        red_blue += reinterpret_cast<Halves>(pixels[k] & 0xff00ffu) * weights[k];
        only_green += reinterpret_cast<Halves>((pixels[k] >> 8) & 0xffu) * weights[k];
      }
      const auto pair = reinterpret_cast<Words>(red_blue);
      const Float r = to_float(reinterpret_cast<Int>(pair & 0xffffu)), b = to_float(reinterpret_cast<Int>(pair >> 16));
      const Float g = to_float(reinterpret_cast<Int>(only_green));
      for (int c = 0; c < 3; ++c) map_channel(scaled + 4 * c, r, g, b, channels[c] + i);
    }
    narrow(channels, size, {red + first, green + first, blue + first});
  }
}

void locate_axis(const Line& line, int64_t size, int64_t count, int32_t* place, int32_t* next) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Int x = locate(line.x, line.dx, indices(i), size);
    store(x >> 8, place + i, count - i);
    store(x & 255, next + i, count - i);
  }
}

void stretch(
    const uint32_t* row, const int32_t* place, const int32_t* right, int64_t count, uint32_t* red_blue,
    uint32_t* green) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t pixel = row[place[i]], next = row[place[i] + 1];
    const auto weight = static_cast<uint32_t>(right[i]);
    red_blue[i] = (pixel & 0xff00ffu) * (256 - weight) + (next & 0xff00ffu) * weight;
    green[i] = (pixel >> 8 & 0xffu) * (256 - weight) + (next >> 8 & 0xffu) * weight;
  }
}

void blend(
    const uint32_t* const (&red_blue)[2], const uint32_t* const (&green)[2], float below, const float* color,
    int64_t count, uint8_t* red, uint8_t* green_plane, uint8_t* blue) {
  alignas(64) int32_t channels[3][kBlock];
  float scaled[12];
  scale_colors(color, scaled);
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    for (int64_t i = 0; i < size; i += kLanes) {
      Float sums[2][3];
      for (int k = 0; k < 2; ++k) {
        const auto pair = load<Words>(red_blue[k] + first + i);
        sums[k][0] = to_float(reinterpret_cast<Int>(pair & 0xffffu));
        sums[k][1] = to_float(load<Int>(green[k] + first + i));
        sums[k][2] = to_float(reinterpret_cast<Int>(pair >> 16));
      }
      Float mixed[3];
      for (int c = 0; c < 3; ++c) mixed[c] = sums[0][c] + (sums[1][c] - sums[0][c]) * below;
      for (int c = 0; c < 3; ++c) map_channel(scaled + 4 * c, mixed[0], mixed[1], mixed[2], channels[c] + i);
    }
    narrow(channels, size, {red + first, green_plane + first, blue + first});
  }
}

void join(const uint8_t* row, const uint8_t* below, int64_t width, uint8_t* cells) {
  for (int64_t i = 0; i < width; ++i) {
    const bool equal = (row[i] == row[i + 1]) & (row[i] == below[i]) & (row[i] == below[i + 1]);
    cells[i] = equal ? row[i] : kMixed;
  }
}

uint8_t vote_of(const Source<uint8_t>& codes, const Block& block, int64_t i) {
  const uint8_t* pixel = codes.data + block.place[i];
  const uint8_t found[4] = {pixel[0], pixel[1], pixel[codes.stride], pixel[codes.stride + 1]};
  const int32_t right = block.right[i], below = block.below[i], diagonal = block.diagonal[i];
  const int32_t weights[4] = {256 - right - below - diagonal, right, below, diagonal};
  int result = 0;
  for (int bit = 0; bit < 8; ++bit) {
    int32_t sum = 0;
    for (int k = 0; k < 4; ++k) sum += weights[k] & -(found[k] >> bit & 1);
    result |= (sum >= 128) << bit;
  }
  return static_cast<uint8_t>(result);
}

void vote(const Source<uint8_t>& codes, const uint8_t* cells, const Line& line, int64_t count, uint8_t* out) {
  Block block;
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    locate_block(codes, line, first, size, block);
    for (int64_t i = 0; i < size; ++i) {
      const uint8_t cell = cells[block.place[i]];
      out[first + i] = cell == kMixed ? vote_of(codes, block, i) : cell;
    }
  }
}

void extract(const uint8_t* codes, int bit, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = codes[i] >> bit & 1;
}

}  // namespace

extern const PixelLoops kPixelLoops;
const PixelLoops kPixelLoops = {pack, sample, locate_axis, stretch, blend, join, vote, extract};

}  // namespace sam2fast::SAM2FAST_ISA
