// The prefix forest of a step on the device: the bytes of host/prefix_forest.cc.
//
// A CTA for each request finds where it leaves the prefix tree of those before it:
//   Search   the longest match among the rows before, by whole comparisons of page ids
// One CTA more builds the forest from what they hand over:
//   Builder  branches -> distinct ones, which are the nodes of the tree
//   FewNodes, ManyNodes  nodes in order -> members -> the nodes that pay -> links of requests
// Nothing is hashed but the names of nodes: a typical request is compared with one or two rows,
// each read once by all threads of its CTA. Block is the CTA as the passes see it: CudaBlock of
// forest_block.h, or threads of a CPU.
#pragma once

#include "fi/common/forest_few.h"
#include "fi/common/forest_many.h"

namespace fi::forest {

// Finds the branch of request `r`.
template <class Block>
class Search {
 public:
  FI_HOST_DEVICE Search(const ForestKernelParams& params, Block& block, int32_t r)
      : p(params), step_(params), block_(block), r_(r), row_(page_row(params.table, r)) {}

  FI_HOST_DEVICE Branch find() {
    Branch best{-1, 0};
    Candidate other{-1, 0};
    int32_t wanted = early_probe(row_, 0);
    const int32_t most = step_.steps(r_);
    FI_ROLLED for (int32_t n = 0; n < kMaxComparisons && best.steps < most; ++n) {
      if (n > 0 || !reads_early(0)) wanted = entry(row_, probe(best.steps));
      other = next_candidate(other.request + 1, best.steps, wanted);
      if (other.request >= r_) break;
      const int32_t steps = common_steps(other.request, min_i32(most, other.steps));
      if (steps > best.steps) best = {other.request, steps};
    }
    return best;
  }

 private:
  // Loads of a thread that are under way together.
  static constexpr int32_t kBatch = 4;

  struct Candidate {
    int32_t request;
    int32_t steps;  // that it may share
  };

  FI_HOST_DEVICE int32_t entry(const int32_t* row, int32_t page) const {
    return row[page * p.table.entry_stride];
  }

  // The page at the end of the step that follows `steps` of them.
  FI_HOST_DEVICE int32_t probe(int32_t steps) const { return (steps + 1) * p.step_pages - 1; }

  // Whether that page of any row lies within the table: then it may be read, stale or not, while
  // lengths are on their way.
  FI_HOST_DEVICE bool reads_early(int32_t steps) const {
    return !p.table.indptr && probe(steps) * p.table.entry_stride < p.table.row_stride;
  }

  FI_HOST_DEVICE int32_t early_probe(const int32_t* row, int32_t steps) const {
    return reads_early(steps) ? entry(row, probe(steps)) : 0;
  }

  // The lowest request from `first` on whose page at the end of the next step is the wanted one; r_
  // if none before it does.
  FI_HOST_DEVICE Candidate next_candidate(int32_t first, int32_t steps, int32_t wanted) {
    FI_ROLLED for (int32_t begin = first; begin < r_; begin += block_.num_threads()) {
      const int32_t other = begin + block_.thread();
      int32_t found = r_;
      if (other < r_) {
        const int32_t* row = page_row(p.table, other);
        int32_t page = early_probe(row, steps);
        if (step_.steps(other) > steps) {
          if (!reads_early(steps)) page = entry(row, probe(steps));
          if (page == wanted) found = other;
        }
      }
      found = block_.min(found);
      if (found < r_) return {found, step_.steps(found)};
    }
    return {r_, 0};
  }

  // Steps, of at most `most`, in which the other row holds the same pages.
  FI_HOST_DEVICE int32_t common_steps(int32_t other, int32_t most) {
    const int32_t* row = page_row(p.table, other);
    const int32_t end = most * p.step_pages, round = kBatch * block_.num_threads();
    FI_ROLLED for (int32_t begin = 0; begin < end; begin += round) {
      int32_t mine[kBatch], theirs[kBatch], first = end;
      for (int32_t i = 0; i < kBatch; ++i) {
        const int32_t page = begin + i * block_.num_threads() + block_.thread();
        mine[i] = theirs[i] = 0;
        if (page >= end) continue;
        mine[i] = entry(row_, page);
        theirs[i] = entry(row, page);
      }
      for (int32_t i = kBatch - 1; i >= 0; --i) {
        if (mine[i] != theirs[i]) first = begin + i * block_.num_threads() + block_.thread();
      }
      first = block_.min(first);
      if (first < end) return first / p.step_pages;
    }
    return most;
  }

  const ForestKernelParams& p;
  const Step step_;
  Block& block_;
  const int32_t r_;
  const int32_t* row_;
};

// Builds the forest from the branches of all requests, in one CTA. As in the planner the time is
// that of one thread's chain of instructions: few passes.
template <class Block>
class Builder {
 public:
  FI_HOST_DEVICE Builder(const ForestKernelParams& params, const Scratch& scratch, Block& block)
      : p(params), s(scratch), step_(params), block_(block) {}

  FI_HOST_DEVICE void run() {
    clear();
    block_.sync();
    name_nodes();
    block_.sync();
    if (*s.num_nodes == 0) {
      write_empty();
    } else if (*s.num_nodes <= block_.num_lanes()) {
      FewNodes<Block>(p, s, block_).run();
    } else {
      ManyNodes<Block>(p, s, block_).run();
    }
  }

 private:
  FI_HOST_DEVICE void clear() const {
    FI_ROLLED for (int32_t i = 2 * block_.thread(); i < p.num_names;
                   i += 2 * block_.num_threads()) {
      store_16(s.names + i, 0, 0, 0, 0);
    }
    if (block_.thread() == 0) s.num_nodes[0] = s.num_nodes[1] = 0;
  }

  // Where a branch's place in `names` is looked for first.
  FI_HOST_DEVICE int32_t first_name(uint64_t key) const {
    const uint32_t mixed = static_cast<uint32_t>(creator_of(key)) * 0x9e3779b1u ^
                           static_cast<uint32_t>(steps_of(key)) * 0x85ebca6bu;
    return static_cast<int32_t>(mixed >> 7) & (p.num_names - 1);
  }

  // Reads the branches. Each distinct one gets a place in `names`, and one in `holders` and `keys`
  // in any order: by the lowest of a warp's lanes that have it.
  FI_HOST_DEVICE void name_nodes() {
    FI_ROLLED for (int32_t first = 0; first < p.num_requests; first += block_.num_threads()) {
      const int32_t r = first + block_.thread();
      const bool exists = r < p.num_requests;
      uint64_t key = 0;
      int32_t kv_len = 0;
      if (exists) {
        s.q_len[r] = step_.q_len(r);
        kv_len = step_.clamped_kv_len(r);
        s.keys_of[r] = key = key_of(block_.take(p.branches + r));
      }
      kv_len = static_cast<int32_t>(block_.warp_sum(kv_len));
      if (block_.lane() == 0) add_to(s.num_nodes + 1, kv_len);
      const int32_t holder = block_.first_equal(key);
      int32_t at = -1;
      if (key != 0 && holder == block_.lane()) at = place_of(key);
      at = block_.shuffle(at, holder);
      if (exists) s.name_of[r] = at;
    }
  }

  FI_HOST_DEVICE int32_t place_of(uint64_t key) {
    int32_t at = first_name(key);
    while (true) {
      const uint64_t found = swap_if_equal(s.names + at, 0, key);
      if (found == key) return at;
      if (found == 0) break;
      at = (at + 1) & (p.num_names - 1);
    }
    const int32_t node = add_to(s.num_nodes, 1);
    s.keys[node] = key;
    s.holders[node] = at;
    return at;
  }

  // Nobody shares anything.
  FI_HOST_DEVICE void write_empty() const {
    const Output out(p);
    FI_ROLLED for (int32_t r = block_.thread(); r < p.num_requests; r += block_.num_threads()) {
      store_16(out.requests + r, 0, 0, 0, 0);
    }
    if (block_.thread() == 0) out.write_header({}, s.num_nodes[1]);
  }

  const ForestKernelParams& p;
  const Scratch& s;
  const Step step_;
  Block& block_;
};

}  // namespace fi::forest
