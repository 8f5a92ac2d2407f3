#include "rows.h"

namespace sam2fast {

namespace baseline {
extern const RowLoops kRowLoops;
}
namespace avx2 {
extern const RowLoops kRowLoops;
}
namespace avx512 {
extern const RowLoops kRowLoops;
}

namespace {

const RowLoops& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::kRowLoops;
  if (avx2) return avx2::kRowLoops;
#endif
  return baseline::kRowLoops;
}

}  // namespace

const RowLoops& row_loops() {
  static const RowLoops& chosen = choose();
  return chosen;
}

}  // namespace sam2fast
