// Arguments of the planner kernel, passed as one __grid_constant__, and the scratch memory of one
// CTA. Host code fills and sizes them: no device functions here.
#pragma once

#include "fi/plan/row_tiles.h"

namespace fi {

struct PlanKernelParams {
  // Constant for a layer class and its capacity.
  Tiling tiling;
  PlanLayout layout;
  Divisor num_kv_heads;
  Divisor num_ctas;  // of the attention launch: spans; below 2^15
  int32_t max_requests;
  int32_t max_tokens;     // query tokens of a step
  int32_t max_kv_len;     // KV tokens of one request
  int32_t max_row_tiles;  // of one KV head
  void* scratch;          // scratch_bytes() for each CTA where shared memory does not hold that
  // The step.
  int32_t num_requests;
  int32_t kv_len_is_int64;
  const int32_t* qo_indptr;  // [num_requests + 1] tokens
  const void* kv_len;        // [num_requests] tokens, new ones included
  void* plan;                // layout.total_bytes, 16-byte aligned
  int32_t* status;           // PlanStatus bits of failing steps are OR-ed in; null: not wanted
};

namespace planner {

// A place in the linear order (request, KV head, tile descending, KV step) where a span ends.
struct Cut {
  int32_t tile;      // row tiles of all KV heads before it
  int32_t step;      // KV steps of its row tile before it; a cut inside a tile has some
  int32_t num_rows;  // packed rows of its row tile
  int32_t items;     // items before it
  int32_t rows;      // partial rows before it
};

// What every CTA works out for itself. "Tiles" here are row tiles of one KV head, requests
// ascending and each request's tiles descending: all heads have the same.
struct Scratch {
  int64_t* cost;          // [max_row_tiles + 1] cost of the tiles before each
  int64_t* pieces;        // [max_row_tiles + 1] batch-invariant mode: items << 32 | partial rows
  int32_t* tile_request;  // [max_row_tiles]
  int32_t* tile_begin;    // [max_requests + 1] tiles of the requests before each
  int32_t* qo_begin;      // [max_requests]
  int32_t* q_len;         // [max_requests]
  int32_t* kv_len;        // [max_requests]
  Cut* cuts;              // [num_ctas + 1]
};

// Hands out arrays from `base` on (16-byte aligned), one after another.
struct ScratchCursor {
  char* base;
  int64_t at;

  template <class T>
  FI_HOST_DEVICE void place(T** array, int64_t count) {
    *array = reinterpret_cast<T*>(base + at);
    at += count * static_cast<int64_t>(sizeof(T));
  }
};

// Returns the bytes taken, a multiple of 16.
FI_HOST_DEVICE inline int64_t place_scratch(const PlanKernelParams& p, char* base, Scratch* out) {
  ScratchCursor cursor{base, 0};
  cursor.place(&out->cost, p.max_row_tiles + 1);
  cursor.place(&out->pieces, p.tiling.chunk.value > 0 ? p.max_row_tiles + 1 : 0);
  cursor.place(&out->tile_request, p.max_row_tiles);
  cursor.place(&out->tile_begin, p.max_requests + 1);
  cursor.place(&out->qo_begin, p.max_requests);
  cursor.place(&out->q_len, p.max_requests);
  cursor.place(&out->kv_len, p.max_requests);
  cursor.place(&out->cuts, p.num_ctas.value + 1);
  return (cursor.at + 15) / 16 * 16;
}

FI_HOST_DEVICE inline int64_t scratch_bytes(const PlanKernelParams& p) {
  Scratch unused;
  return place_scratch(p, nullptr, &unused);
}

}  // namespace planner
}  // namespace fi
