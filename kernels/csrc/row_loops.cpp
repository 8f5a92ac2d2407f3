#include "dense.h"
#include "pixels.h"
#include "rows.h"

namespace sam2fast {

namespace baseline {
extern const RowLoops kRowLoops;
extern const DenseLoops kDenseLoops;
extern const PixelLoops kPixelLoops;
}
namespace avx2 {
extern const RowLoops kRowLoops;
extern const DenseLoops kDenseLoops;
extern const PixelLoops kPixelLoops;
}
namespace avx512 {
extern const RowLoops kRowLoops;
extern const DenseLoops kDenseLoops;
extern const PixelLoops kPixelLoops;
}

namespace {

struct Loops {
  const RowLoops& rows;
  const DenseLoops& dense;
  const PixelLoops& pixels;
};

Loops choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {avx512::kRowLoops, avx512::kDenseLoops, avx512::kPixelLoops};
  if (avx2) return {avx2::kRowLoops, avx2::kDenseLoops, avx2::kPixelLoops};
#endif
  return {baseline::kRowLoops, baseline::kDenseLoops, baseline::kPixelLoops};
}

const Loops& loops() {
  static const Loops chosen = choose();
  return chosen;
}

}  // namespace

const RowLoops& row_loops() { return loops().rows; }
const DenseLoops& dense_loops() { return loops().dense; }
const PixelLoops& pixel_loops() { return loops().pixels; }

}  // namespace sam2fast
