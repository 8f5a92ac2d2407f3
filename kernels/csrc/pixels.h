// Loops of warp.cpp over the pixels of one output row, compiled for several instruction sets (pixels.cpp); see rows.h.

#pragma once

#include <cstdint>

namespace sam2fast {

// Source coordinates of the pixels of an output row: pixel i lies at (x + i dx, y + i dy), in pixels of the source.
struct Line {
  float x, y, dx, dy;
};

// An image of 4-byte words (red in the lowest byte), or cells of codes. One more row and column than `height` and
// `width` say follow, copies of the last ones, so that a pixel and its three neighbors can always be read.
template <typename Element>
struct Source {
  const Element* data;
  int64_t stride, height, width;
};

struct PixelLoops {
  // RGB bytes to words.
  void (*pack)(const uint8_t* rgb, int64_t width, uint32_t* words);
  // Bilinear samples at the pixels of a line, mapped by color[3][4], rounded and clipped, to one row of three planes.
  // Coordinates outside the source are clamped to it.
  void (*sample)(
      const Source<uint32_t>& source, const Line& line, const float* color, int64_t count, uint8_t* red,
      uint8_t* green, uint8_t* blue);
  // Of pixels along `line.x`: the one of `size` source pixels before each, and the weight of the next one in 1/256.
  void (*locate_axis)(const Line& line, int64_t size, int64_t count, int32_t* place, int32_t* next);
  // A row of the source at these places, in 1/256: red in the lower and blue in the upper half of a word, and green.
  void (*stretch)(
      const uint32_t* row, const int32_t* place, const int32_t* right, int64_t count, uint32_t* red_blue,
      uint32_t* green);
  // Two stretched rows, the lower one with the weight `below`, mapped as by `sample`.
  void (*blend)(
      const uint32_t* const (&red_blue)[2], const uint32_t* const (&green)[2], float below, const float* color,
      int64_t count, uint8_t* red, uint8_t* green_plane, uint8_t* blue);
  // Cells from a row of codes and the one below it, `width` + 1 of each: the code where all four are equal, else kMixed.
  void (*join)(const uint8_t* row, const uint8_t* below, int64_t width, uint8_t* cells);
  // Codes at the pixels of a line: each bit is set where bilinear weights of the four neighbors that have it reach 1/2.
  // Cell (0, 0) is the one of pixel (0, 0) of `codes`.
  void (*vote)(
      const Source<uint8_t>& codes, const uint8_t* cells, const Line& line, int64_t count, uint8_t* out);
  // One bit of each code as bytes 0 and 1.
  void (*extract)(const uint8_t* codes, int bit, int64_t count, uint8_t* out);
};

constexpr uint8_t kMixed = 255;  // is a code too, whose cells then take the longer way to the same result

const PixelLoops& pixel_loops();

}  // namespace sam2fast
