// Vectors of float32 from and to the bits of the half precisions. Neither compilers nor processors convert both formats
// everywhere, so this takes nothing but float32 and integers.

#pragma once

#include <cstdint>

#include "rows.h"
#include "simd.h"

namespace sam2fast::SAM2FAST_ISA {

typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

SAM2FAST_INLINE Float as_float(Bits bits) { return reinterpret_cast<Float>(bits); }
SAM2FAST_INLINE Bits as_bits(Float value) { return reinterpret_cast<Bits>(value); }

// Rounds to nearest, ties to even, when the lowest `count` bits are cut off.
SAM2FAST_INLINE Bits round_off(Bits bits, int count) {
  return (bits + ((1u << (count - 1)) - 1) + ((bits >> count) & 1)) >> count;
}

template <Format kFormat>
SAM2FAST_INLINE Float widen(Halves halves) {
  const Bits bits = __builtin_convertvector(halves, Bits);
  if constexpr (kFormat == Format::bfloat16) return as_float(bits << 16);
  const Bits magnitude = bits & 0x7fff;
  // The product moves the exponent from bias 15 to 127, and makes subnormal values normal.
  const Bits finite = as_bits(as_float(magnitude << 13) * 0x1p112f);
  const Bits special = 0x7f800000 | (magnitude << 13);
  return as_float((magnitude >= 0x7c00 ? special : finite) | ((bits & 0x8000) << 16));
}

template <Format kFormat>
SAM2FAST_INLINE Halves narrow(Float value) {
  const Bits bits = as_bits(value), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  Bits rounded;
  if constexpr (kFormat == Format::bfloat16) {
    rounded = magnitude > 0x7f800000 ? 0x7fc0 + Bits{} : round_off(magnitude, 16);
  } else {
    const Bits normal = round_off(magnitude - (112u << 23), 13);
    // Beside 1/2, one unit in the last place is the smallest float16, 2^-24.
    const Bits subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(broadcast(0.5f));
    rounded = magnitude < 0x38800000 ? subnormal : normal;           // 2^-14
    rounded = magnitude >= 0x47800000 ? 0x7c00 + Bits{} : rounded;   // 2^16
    rounded = magnitude > 0x7f800000 ? 0x7e00 + Bits{} : rounded;    // NaN
  }
  return __builtin_convertvector(rounded | sign, Halves);
}

template <Format kFormat>
struct Element {
  using type = uint16_t;
};
template <>
struct Element<Format::float32> {
  using type = float;
};

// Stores the first `count` lanes as elements of `kFormat`.
template <Format kFormat>
SAM2FAST_INLINE void store_as(Float value, typename Element<kFormat>::type* out, int64_t count) {
  if constexpr (kFormat == Format::float32) {
    store(value, out, count);
  } else {
    store(narrow<kFormat>(value), out, count);
  }
}

}  // namespace sam2fast::SAM2FAST_ISA
