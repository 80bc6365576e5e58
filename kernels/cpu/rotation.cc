#include "cpu/rotation.h"

#include <algorithm>

namespace fi::cpu {

Rotator::Rotator(const Job& job, const VariantBox& rows)
    : job_(job), rotation_(job.params.rotation), base_(gone_before(rows.q_pos_min)) {}

// Tokens that a query no longer sees.
int32_t Rotator::gone_before(int32_t q_pos) const {
  if (rotation_.window == 0) return 0;
  const int64_t kept = static_cast<int64_t>(rotation_.sink_prefix) + rotation_.window;
  return static_cast<int32_t>(std::max<int64_t>(0, q_pos + 1 - kept));
}

// Tiles end where the leading tokens do (KvTiles).
bool Rotator::has_sinks(const KvTile& tile) const {
  return rotation_.window > 0 && tile.begin < rotation_.sink_prefix;
}

float* Rotator::q_of(const KvTile& tile, const Scratch& scratch) const {
  return has_sinks(tile) ? scratch.q_for_sinks : scratch.q;
}

// A query before the first token sees nothing; one slot is as good as another.
void Rotator::turn_q(int32_t num_rows, Scratch* scratch) const {
  for (int32_t r = 0; r < num_rows; ++r) {
    const int32_t q_pos = std::max(0, scratch->rows[r].q_pos);
    float* q = scratch->q + r * job_.q_stride;
    float* q_for_sinks = scratch->q_for_sinks + r * job_.q_stride;
    std::copy_n(q, job_.q_stride, q_for_sinks);
    turn(q, q_pos - base_);
    turn(q_for_sinks, q_pos - gone_before(q_pos));
  }
}

void Rotator::turn_k(const KvTile& tile, Scratch* scratch) const {
  const int32_t dtype = static_cast<int32_t>(job_.params.kv.dtype);
  const int32_t base = has_sinks(tile) ? 0 : base_;
  for (int32_t c = 0; c < tile.size(); ++c) {
    float* k = scratch->k_turned + c * job_.q_stride;
    job_.isa.load_row[dtype](tile.k[c], k, job_.params.heads.head_dim_qk);
    // A tile may begin before the first row's window; nobody sees those.
    turn(k, std::max(0, tile.begin + c - base));
    scratch->k_turned_rows[c] = k;
  }
  for (int32_t c = tile.size(); c % kColPad != 0; ++c) scratch->k_turned_rows[c] = scratch->zeros;
}

void Rotator::turn(float* row, int32_t slot) const {
  const int32_t half = rotation_.rotary_dim / 2;
  const float* cos = rotation_.cos_sin + slot * rotation_.stride;
  const float* sin = cos + half;
  const int32_t step = rotation_.interleaved ? 2 : 1, partner = rotation_.interleaved ? 1 : half;
  for (int32_t i = 0; i < half; ++i) {
    float& x = row[i * step];
    float& y = row[i * step + partner];
    const double a = x, b = y;  // one rounding each: products of opposite sign may nearly cancel
    x = static_cast<float>(a * cos[i] - b * sin[i]);
    y = static_cast<float>(b * cos[i] + a * sin[i]);
  }
}

}  // namespace fi::cpu
