#include "dense.h"
#include "rows.h"

namespace sam2fast {

namespace baseline {
extern const RowLoops kRowLoops;
extern const DenseLoops kDenseLoops;
}
namespace avx2 {
extern const RowLoops kRowLoops;
extern const DenseLoops kDenseLoops;
}
namespace avx512 {
extern const RowLoops kRowLoops;
extern const DenseLoops kDenseLoops;
}

namespace {

struct Loops {
  const RowLoops& rows;
  const DenseLoops& dense;
};

Loops choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {avx512::kRowLoops, avx512::kDenseLoops};
  if (avx2) return {avx2::kRowLoops, avx2::kDenseLoops};
#endif
  return {baseline::kRowLoops, baseline::kDenseLoops};
}

const Loops& loops() {
  static const Loops chosen = choose();
  return chosen;
}

}  // namespace

const RowLoops& row_loops() { return loops().rows; }
const DenseLoops& dense_loops() { return loops().dense; }

}  // namespace sam2fast
