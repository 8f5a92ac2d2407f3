// sam2fast::rle_decode on the CPU. The format, and what counts as a fault, are described in kernels/rle/README.md;
// kernels/rle/reference.py is the ground truth of every branch here.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxCharacters = 12;

// The same numbers as Fault in kernels/rle/reference.py.
enum Fault : int64_t { kNone, kCharacter, kTruncated, kTooLong, kNegative, kBeyond, kShort };

struct Status {
  Fault fault;
  int64_t detail;
};

struct Number {
  int64_t value;
  Fault fault;
};

// Reads one number and moves `text` behind it. 12 characters are 60 bits: value plus a run length fits in int64.
Number read_number(std::span<const uint8_t>& text) {
  int64_t value = 0;
  int shift = 0;
  unsigned group = 0;
  do {
    if (text.empty()) return {0, kTruncated};
    group = static_cast<unsigned>(text.front()) - 48u;
    if (group >= 64u) return {0, kCharacter};
    if (shift == 5 * kMaxCharacters) return {0, kTooLong};
    value |= static_cast<int64_t>(group & 31u) << shift;
    shift += 5;
    text = text.subspan(1);
  } while (group & 32u);
  if (group & 16u) value -= int64_t{1} << shift;
  return {value, kNone};
}

Status parse(std::span<const uint8_t> text, int64_t area, std::vector<int64_t>& runs) {
  runs.clear();
  int64_t total = 0;
  while (!text.empty()) {
    const auto index = static_cast<int64_t>(runs.size());
    auto [value, fault] = read_number(text);
    if (fault != kNone) return {fault, index};
    if (index > 2) value += runs[index - 2];
    if (value < 0) return {kNegative, index};
    if (value > area - total) return {kBeyond, index};
    runs.push_back(value);
    total += value;
  }
  return total == area ? Status{kNone, 0} : Status{kShort, total};
}

// Runs count pixels down the columns; the mask is stored row by row. `runs` cover exactly height * width pixels.
void fill(const std::vector<int64_t>& runs, int64_t height, int64_t width, uint8_t* mask) {
  int64_t start = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const int64_t end = start + runs[i];
    if (i % 2 == 1) {
      int64_t row = start % height;
      uint8_t* column = mask + start / height;
      for (int64_t left = runs[i]; left > 0;) {
        const int64_t stop = row + left < height ? row + left : height;
        left -= stop - row;
        for (; row < stop; ++row) column[row * width] = 1;
        row = 0;
        ++column;
      }
    }
    start = end;
  }
}

void check_inputs(const Tensor& counts, const Tensor& offsets, int64_t height, int64_t width) {
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Byte && counts.dim() == 1 && offsets.scalar_type() == ScalarType::Long &&
          offsets.dim() == 1,
      "rle_decode: counts must be uint8 [L] and offsets int64 [N + 1]");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(
      0 < height && height <= limit && 0 < width && width <= limit,
      "rle_decode: height and width must be 1 to 2^31 - 1, not ", height, " x ", width);
}

std::tuple<Tensor, Tensor> rle_decode(Tensor counts, Tensor offsets, int64_t height, int64_t width) {
  check_inputs(counts, offsets, height, width);
  counts = torch::stable::contiguous(counts);
  offsets = torch::stable::contiguous(offsets);
  const auto* text = static_cast<const uint8_t*>(counts.const_data_ptr());
  const auto* bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t n = offsets.numel() - 1;
  bool rising = n >= 0 && bounds[0] == 0 && bounds[n] == counts.numel();
  for (int64_t i = 0; rising && i < n; ++i) rising = bounds[i] <= bounds[i + 1];
  STD_TORCH_CHECK(rising, "rle_decode: offsets must rise from 0 to the length of counts");

  const int64_t area = height * width;
  Tensor masks = torch::stable::new_empty(counts, {n, height, width}, ScalarType::Bool);
  Tensor status = torch::stable::new_empty(offsets, {n, 2});
  auto* mask_data = static_cast<uint8_t*>(masks.mutable_data_ptr());
  auto* status_data = static_cast<int64_t*>(status.mutable_data_ptr());

  // torch's own thread count: 1 in a data loader's worker, where a forked OpenMP pool would hang.
  [[maybe_unused]] const int threads = static_cast<int>(torch::stable::get_num_threads());
#pragma omp parallel num_threads(threads) if (n > 1 && threads > 1)
  {
    std::vector<int64_t> runs;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n; ++i) {
      uint8_t* mask = mask_data + i * area;
      std::memset(mask, 0, static_cast<size_t>(area));
      const std::span<const uint8_t> own(text + bounds[i], static_cast<size_t>(bounds[i + 1] - bounds[i]));
      const Status found = parse(own, area, runs);
      if (found.fault == kNone) fill(runs, height, width, mask);
      status_data[2 * i] = found.fault;
      status_data[2 * i + 1] = found.detail;
    }
  }
  return {masks, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sam2fast, CPU, m) {
  m.impl("rle_decode.cpp", TORCH_BOX(&rle_decode));
}
