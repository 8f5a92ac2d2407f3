// Planes of low-resolution logits cut into bands of rows for threads, and the gradient of these rows.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <vector>

#include "bilinear.h"
#include "rows.h"

namespace sam2fast {

// Low-resolution rows [first, last) of plane [n, m].
struct Band {
  int64_t index, plane, n, m, first, last;
};

// The bands of logits [N, M, h, w]. They are the same for every number of threads, so results are too.
struct Bands {
  static constexpr int64_t kRows = 32;
  int64_t planes, candidates, height, per_plane;

  explicit Bands(const Tensor& logits)
      : planes(logits.size(0) * logits.size(1)),
        candidates(logits.size(1)),
        height(logits.size(2)),
        per_plane((height + kRows - 1) / kRows) {}
  int64_t count() const { return planes * per_plane; }
  Band at(int64_t index) const {
    const int64_t plane = index / per_plane, first = index % per_plane * kRows;
    return {index, plane, plane / candidates, plane % candidates, first, std::min(first + kRows, height)};
  }
};

// work(index) for every index below `count`; each thread calls a `work` of its own, which `make` returns.
template <typename Make>
void for_each_index(int64_t count, const Make& make) {
  // torch's own thread count: 1 in a data loader's worker, where a forked OpenMP pool would hang.
  [[maybe_unused]] const int threads =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(count, torch::stable::get_num_threads())));
  // Out of memory, say: an exception must not leave the parallel region.
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const auto guard = [&](const auto& body) {
      try {
        body();
      } catch (...) {
#pragma omp critical(sam2fast_failure)
        failure = std::current_exception();
      }
    };
    std::optional<decltype(make())> work;
    guard([&] { work.emplace(make()); });
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < count; ++index) {
      if (work) guard([&] { (*work)(index); });
    }
  }
  if (failure) std::rethrow_exception(failure);
}

// The same for rows, of which a thread takes `together` at a time.
template <typename Make>
void for_each_row(int64_t rows, int64_t together, const Make& make) {
  for_each_index((rows + together - 1) / together, [&] {
    return [&, work = make()](int64_t chunk) mutable {
      const int64_t last = std::min((chunk + 1) * together, rows);
      for (int64_t row = chunk * together; row < last; ++row) work(row);
    };
  });
}

// The same for the bands.
template <typename Make>
void for_each_band(const Bands& bands, const Make& make) {
  for_each_index(bands.count(), [&] { return [&, work = make()](int64_t index) mutable { work(bands.at(index)); }; });
}

// Gradient of a band of low-resolution rows, gathered from every full-resolution row that they touch; rows at the edges
// of a band are computed for both bands.
class GradientBand {
 public:
  GradientBand(const Axis& rows, const Axis& columns)
      : rows_(rows),
        columns_(columns),
        full_(columns.buffer()),
        left_(columns.size + 1),
        right_(columns.size + 1),
        reduced_(columns.size) {}

  // Returns [last - first, w], or null where `source` says that all is 0; see `gather_gradient`.
  template <typename Source>
  const float* gather(const Band& band, Source& source) {
    // Cells first - 1 to last - 1.
    const int64_t top = std::max<int64_t>(0, rows_.factor * (band.first - 1) + rows_.factor / 2);
    const int64_t bottom = std::min(rows_.full(), rows_.factor * band.last + rows_.factor / 2);
    if (!source.start(band, top, bottom)) return nullptr;
    gradient_.assign((band.last - band.first) * columns_.size, 0.0f);
    for (int64_t y = top; y < bottom; ++y) {
      // Outside the image `full_` stays 0.
      source.row(y, full_.data() + columns_.offset());
      loops_.reduce(columns_.view(), full_.data(), left_.data(), right_.data(), reduced_.data());
      const Tap between = tap(y, rows_.factor, rows_.size);
      add(between.low, 1.0f - between.weight, band);
      add(between.high, between.weight, band);
    }
    return gradient_.data();
  }

 private:
  void add(int64_t row, float weight, const Band& band) {
    if (weight == 0.0f || row < band.first || row >= band.last) return;
    float* out = gradient_.data() + (row - band.first) * columns_.size;
    for (int64_t j = 0; j < columns_.size; ++j) out[j] += weight * reduced_[j];
  }

  const RowLoops& loops_ = row_loops();
  const Axis& rows_;
  const Axis& columns_;
  std::vector<float> full_, left_, right_, reduced_, gradient_;
};

// Gradient of logits [N, M, h, w], contiguous, from gradients of the upsampled logits. `make` returns each thread a
// source of the latter, with
//   bool start(const Band& band, int64_t top, int64_t bottom): full-resolution rows [top, bottom) of the plane of this
//     band will be asked for; false says that all of them are 0;
//   void row(int64_t y, float* out): writes one of them.
template <typename Make>
Tensor gather_gradient(const Tensor& logits, const Axis& rows, const Axis& columns, const Make& make) {
  Tensor gradient =
      torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2), logits.size(3)});
  auto* data = static_cast<char*>(gradient.mutable_data_ptr());
  const Format format = format_of(logits.scalar_type());
  for_each_band(Bands(logits), [&] {
    return [&, source = make(), gradient_band = GradientBand(rows, columns)](const Band& band) mutable {
      const int64_t count = (band.last - band.first) * columns.size;
      char* out = data + (band.plane * rows.size + band.first) * columns.size * bytes_of(format);
      if (const float* values = gradient_band.gather(band, source)) {
        row_loops().store(values, count, format, out);
      } else {
        std::memset(out, 0, count * bytes_of(format));
      }
    };
  });
  return gradient;
}

}  // namespace sam2fast
