// Numbers of the NPU double: from half precision to float32 and back, and TF32.
#pragma once
// As the wheel was built, but without oneDNN, whose headers it does not ship.
#define PADDLE_WITH_CUSTOM_DEVICE

#include <cstdint>
#include <cstring>

#include "paddle/phi/common/bfloat16.h"
#include "paddle/phi/common/data_type.h"
#include "paddle/phi/common/float16.h"

namespace {

using phi::DataType;

inline bool Narrow(DataType t) {
  return t == DataType::FLOAT16 || t == DataType::BFLOAT16;
}

template <typename From, typename To>
void Convert(const void* from, void* to, int64_t n) {
  auto* f = static_cast<const From*>(from);
  auto* t = static_cast<To*>(to);
  for (int64_t i = 0; i < n; ++i) t[i] = static_cast<To>(f[i]);
}
inline void ToFloat(DataType from, const void* in, void* out, int64_t n) {
  if (from == DataType::FLOAT16)
    Convert<phi::dtype::float16, float>(in, out, n);
  else
    Convert<phi::dtype::bfloat16, float>(in, out, n);
}
inline void FromFloat(DataType to, const void* in, void* out, int64_t n) {
  if (to == DataType::FLOAT16)
    Convert<float, phi::dtype::float16>(in, out, n);
  else
    Convert<float, phi::dtype::bfloat16>(in, out, n);
}

// To the nearest number of 10 bits of fraction, ties to even.
inline void RoundToTf32(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, in + i, sizeof bits);
    bits = (bits + 0x0FFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

}  // namespace
