// Bounds on what a printed mask function can return over a whole tile.
//
// The same printed text runs on these types instead of int32_t, bool and float. Everything is an
// over-approximation: an operation that might wrap gives all integers, a tensor read gives
// anything, floats are not tracked. Correlation between operands is lost (x - x is not 0), which
// costs tiles marked mixed that are not, never the reverse.
#pragma once

#include "fi/attention/variant_hooks.h"
#include "fi/attention/variant_math.h"

namespace fi::variants {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Constrained constructors: a literal of the printed text converts to exactly one of the types.
struct Truth {
  bool can_be_false = true;
  bool can_be_true = true;

  constexpr Truth() = default;
  FI_HOST_DEVICE constexpr Truth(bool no, bool yes) : can_be_false(no), can_be_true(yes) {}
  template <class T>
    requires kSame<T, bool>
  FI_HOST_DEVICE constexpr Truth(T value) : can_be_false(!value), can_be_true(value) {}
};

struct Interval {
  int32_t lo = kMin;
  int32_t hi = kMax;

  static constexpr int32_t kMin = -2147483647 - 1;
  static constexpr int32_t kMax = 2147483647;

  constexpr Interval() = default;
  template <class T>
    requires kSame<T, int32_t>
  FI_HOST_DEVICE constexpr Interval(T value) : lo(value), hi(value) {}

  // All integers when a bound does not fit: the value may have wrapped to anything.
  FI_HOST_DEVICE static constexpr Interval exact(int64_t lo, int64_t hi) {
    Interval result;
    if (lo >= kMin && hi <= kMax) {
      result.lo = static_cast<int32_t>(lo);
      result.hi = static_cast<int32_t>(hi);
    }
    return result;
  }
  FI_HOST_DEVICE constexpr bool is_point() const { return lo == hi; }
};

struct Unknown {  // a float
  constexpr Unknown() = default;
  template <class T>
    requires kSame<T, float>
  FI_HOST_DEVICE constexpr Unknown(T) {}
};

FI_HOST_DEVICE constexpr int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
FI_HOST_DEVICE constexpr int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
FI_HOST_DEVICE constexpr Interval hull(int64_t a, int64_t b, int64_t c, int64_t d) {
  return Interval::exact(min_i64(min_i64(a, b), min_i64(c, d)),
                         max_i64(max_i64(a, b), max_i64(c, d)));
}

// Booleans.
FI_HOST_DEVICE constexpr Truth operator!(Truth a) { return {a.can_be_true, a.can_be_false}; }
FI_HOST_DEVICE constexpr Truth operator&&(Truth a, Truth b) {
  return {a.can_be_false || b.can_be_false, a.can_be_true && b.can_be_true};
}
FI_HOST_DEVICE constexpr Truth operator||(Truth a, Truth b) { return !(!a && !b); }

// Comparisons.
FI_HOST_DEVICE constexpr Truth operator<(Interval a, Interval b) {
  return {a.hi >= b.lo, a.lo < b.hi};
}
FI_HOST_DEVICE constexpr Truth operator<=(Interval a, Interval b) {
  return {a.hi > b.lo, a.lo <= b.hi};
}
FI_HOST_DEVICE constexpr Truth operator>(Interval a, Interval b) { return b < a; }
FI_HOST_DEVICE constexpr Truth operator>=(Interval a, Interval b) { return b <= a; }
FI_HOST_DEVICE constexpr Truth operator==(Interval a, Interval b) {
  return {!(a.is_point() && b.is_point() && a.lo == b.lo), a.lo <= b.hi && b.lo <= a.hi};
}
FI_HOST_DEVICE constexpr Truth operator!=(Interval a, Interval b) { return !(a == b); }

// Integers.
FI_HOST_DEVICE constexpr Interval add(Interval a, Interval b) {
  return Interval::exact(int64_t{a.lo} + b.lo, int64_t{a.hi} + b.hi);
}
FI_HOST_DEVICE constexpr Interval sub(Interval a, Interval b) {
  return Interval::exact(int64_t{a.lo} - b.hi, int64_t{a.hi} - b.lo);
}
FI_HOST_DEVICE constexpr Interval mul(Interval a, Interval b) {
  const int64_t lo = a.lo, hi = a.hi;
  return hull(lo * b.lo, lo * b.hi, hi * b.lo, hi * b.hi);
}
FI_HOST_DEVICE constexpr Interval neg(Interval a) {
  return Interval::exact(-int64_t{a.hi}, -int64_t{a.lo});
}
FI_HOST_DEVICE constexpr Interval abs(Interval a) {
  if (a.lo >= 0) return a;
  if (a.hi <= 0) return neg(a);
  return Interval::exact(0, max_i64(-int64_t{a.lo}, a.hi));
}
FI_HOST_DEVICE constexpr Interval minimum(Interval a, Interval b) {
  return Interval::exact(min_i64(a.lo, b.lo), min_i64(a.hi, b.hi));
}
FI_HOST_DEVICE constexpr Interval maximum(Interval a, Interval b) {
  return Interval::exact(max_i64(a.lo, b.lo), max_i64(a.hi, b.hi));
}

FI_HOST_DEVICE constexpr int64_t floor_div_i64(int64_t a, int64_t b) {
  const int64_t quotient = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}
// For a divisor of one sign the quotient is monotone in each operand: corners bound it.
FI_HOST_DEVICE constexpr Interval floor_div(Interval a, Interval b) {
  if (b.lo <= 0 && b.hi >= 0) return {};
  return hull(floor_div_i64(a.lo, b.lo), floor_div_i64(a.lo, b.hi), floor_div_i64(a.hi, b.lo),
              floor_div_i64(a.hi, b.hi));
}
FI_HOST_DEVICE constexpr Interval floor_mod(Interval a, Interval b) {
  if (b.lo <= 0 && b.hi >= 0) return {};
  if (b.is_point() && floor_div_i64(a.lo, b.lo) == floor_div_i64(a.hi, b.lo)) {
    const int64_t base = floor_div_i64(a.lo, b.lo) * b.lo;
    return Interval::exact(a.lo - base, a.hi - base);
  }
  return b.lo > 0 ? Interval::exact(0, int64_t{b.hi} - 1) : Interval::exact(int64_t{b.lo} + 1, 0);
}

FI_HOST_DEVICE constexpr Interval shl(Interval a, Interval count) {
  if (count.lo < 0 || count.hi > 31) return {};
  const int64_t low = int64_t{1} << count.lo, high = int64_t{1} << count.hi;
  return hull(a.lo * low, a.lo * high, a.hi * low, a.hi * high);
}
FI_HOST_DEVICE constexpr Interval shr(Interval a, Interval count) {
  if (count.lo < 0 || count.hi > 31) return {};
  return hull(a.lo >> count.lo, a.lo >> count.hi, a.hi >> count.lo, a.hi >> count.hi);
}

// Smallest 2^k - 1 that is at least x >= 0: or and xor of values up to x stay below it.
FI_HOST_DEVICE constexpr int64_t all_ones(int64_t x) {
  int64_t ones = 0;
  while (ones < x) ones = ones * 2 + 1;
  return ones;
}
FI_HOST_DEVICE constexpr Interval operator&(Interval a, Interval b) {
  if (a.is_point() && b.is_point()) return a.lo & b.lo;
  if (a.lo >= 0 && b.lo >= 0) return Interval::exact(0, min_i64(a.hi, b.hi));
  if (a.lo >= 0) return Interval::exact(0, a.hi);
  if (b.lo >= 0) return Interval::exact(0, b.hi);
  return {};
}
FI_HOST_DEVICE constexpr Interval operator|(Interval a, Interval b) {
  if (a.is_point() && b.is_point()) return a.lo | b.lo;
  if (a.lo < 0 || b.lo < 0) return {};
  return Interval::exact(max_i64(a.lo, b.lo), all_ones(max_i64(a.hi, b.hi)));
}
FI_HOST_DEVICE constexpr Interval operator^(Interval a, Interval b) {
  if (a.is_point() && b.is_point()) return a.lo ^ b.lo;
  if (a.lo < 0 || b.lo < 0) return {};
  return Interval::exact(0, all_ones(max_i64(a.hi, b.hi)));
}
FI_HOST_DEVICE constexpr Interval operator~(Interval a) {
  return Interval::exact(~int64_t{a.hi}, ~int64_t{a.lo});
}

// Choices and conversions.
FI_HOST_DEVICE constexpr Interval select(Truth condition, Interval yes, Interval no) {
  if (!condition.can_be_false) return yes;
  if (!condition.can_be_true) return no;
  return Interval::exact(min_i64(yes.lo, no.lo), max_i64(yes.hi, no.hi));
}
FI_HOST_DEVICE constexpr Truth select(Truth condition, Truth yes, Truth no) {
  return (condition && yes) || (!condition && no);
}
FI_HOST_DEVICE constexpr Unknown select(Truth, Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Interval to_i32(Truth a) {
  return Interval::exact(a.can_be_false ? 0 : 1, a.can_be_true ? 1 : 0);
}
FI_HOST_DEVICE constexpr Unknown to_f32(Interval) { return {}; }
FI_HOST_DEVICE constexpr Unknown to_f32(Truth) { return {}; }

// Floats.
FI_HOST_DEVICE constexpr Unknown operator-(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown operator+(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown operator-(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown operator*(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown operator/(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown minimum(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown maximum(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown abs(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown sqrt(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown exp(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown log(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown tanh(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Unknown sigmoid(Unknown) { return {}; }
FI_HOST_DEVICE constexpr Truth operator<(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Truth operator<=(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Truth operator>(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Truth operator>=(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Truth operator==(Unknown, Unknown) { return {}; }
FI_HOST_DEVICE constexpr Truth operator!=(Unknown, Unknown) { return {}; }

template <class T>
struct BoundsOf {
  using Type = Interval;
};
template <>
struct BoundsOf<bool> {
  using Type = Truth;
};
template <>
struct BoundsOf<float> {
  using Type = Unknown;
};

// What a printed function asks of its context, answered for all rows and columns of a box.
struct BoxContext {
  const VariantBox& box;
  const VariantParam* params;

  FI_HOST_DEVICE Interval q_pos() const { return Interval::exact(box.q_pos_min, box.q_pos_max); }
  FI_HOST_DEVICE Interval kv_pos() const { return Interval::exact(box.kv_pos_min, box.kv_pos_max); }
  FI_HOST_DEVICE Interval q_len() const { return Interval::exact(box.q_len_min, box.q_len_max); }
  FI_HOST_DEVICE Interval kv_len() const { return Interval::exact(box.kv_len_min, box.kv_len_max); }
  FI_HOST_DEVICE Interval q_head() const { return Interval::exact(box.q_head_min, box.q_head_max); }
  FI_HOST_DEVICE Interval kv_head() const { return {}; }
  FI_HOST_DEVICE Interval token() const { return {}; }
  FI_HOST_DEVICE Interval request() const { return {}; }

  template <class T>
  FI_HOST_DEVICE typename BoundsOf<T>::Type scalar(int32_t index) const {
    return static_cast<T>(params[index].scalar);
  }
  template <class T, class... Indices>
  FI_HOST_DEVICE typename BoundsOf<T>::Type load(int32_t, Truth, Indices...) const {
    return {};
  }
};

template <class Function>
FI_HOST_DEVICE MaskKind mask_kind_of(const VariantBox& box, const VariantParam* params) {
  const Truth visible = Function::apply(BoxContext{box, params});
  if (!visible.can_be_true) return MaskKind::kEmpty;
  return visible.can_be_false ? MaskKind::kMixed : MaskKind::kFull;
}

}  // namespace fi::variants
