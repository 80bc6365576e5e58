#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

namespace fi::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

std::atomic<ThreadPool*> process_pool{nullptr};

}  // namespace

void ThreadPool::AlignedFree::operator()(char* p) const { ::operator delete(p, kAlignment); }

ThreadPool& ThreadPool::instance() {
  // Only the forking thread lives on in a child, perhaps while another holds a lock of the pool:
  // the child forgets the pool (and its memory) and starts its own.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { process_pool.store(nullptr); });
  static_cast<void>(registered);
  ThreadPool* pool = process_pool.load();
  if (pool) return *pool;
  ThreadPool* fresh = new ThreadPool();
  if (process_pool.compare_exchange_strong(pool, fresh)) return *fresh;
  delete fresh;  // another thread was first; no worker of ours has started
  return *pool;
}

// Allocates and starts whatever is missing, on the caller, where an exception can still be thrown.
void ThreadPool::prepare(int num_threads, size_t scratch_bytes) {
  if (scratch_.size() < static_cast<size_t>(num_threads)) scratch_.resize(num_threads);
  for (int i = 0; i < num_threads; ++i) {
    if (scratch_[i].bytes >= scratch_bytes) continue;
    scratch_[i].data.reset(static_cast<char*>(::operator new(scratch_bytes, kAlignment)));
    scratch_[i].bytes = scratch_bytes;
    std::memset(scratch_[i].data.get(), 0, scratch_bytes);
  }
  while (num_workers_ < num_threads - 1) {
    std::thread(&ThreadPool::worker, this, num_workers_ + 1, job_).detach();
    ++num_workers_;
  }
}

void ThreadPool::run(int num_threads, size_t scratch_bytes, const Body& body) {
  std::lock_guard<std::mutex> turn(turn_);
  num_threads = std::max(num_threads, 1);
  prepare(num_threads, scratch_bytes);
  if (num_threads > 1) {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    job_threads_ = num_threads;
    running_ = num_threads - 1;
    ++job_;
    job_ready_.notify_all();
  }
  body(scratch_[0].data.get());
  if (num_threads > 1) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_done_.wait(lock, [this] { return running_ == 0; });
  }
}

void ThreadPool::worker(int index, uint64_t seen_job) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    job_ready_.wait(lock, [&] { return job_ != seen_job; });
    seen_job = job_;
    if (index >= job_threads_) continue;
    const Body* body = body_;
    char* scratch = scratch_[index].data.get();
    lock.unlock();
    (*body)(scratch);
    lock.lock();
    if (--running_ == 0) job_done_.notify_one();
  }
}

void parallel_for(int num_threads, int64_t count, int64_t grain, size_t scratch_bytes,
                  const std::function<void(int64_t begin, int64_t end, char* scratch)>& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), pieces));
  ThreadPool::instance().run(threads, scratch_bytes, [&](char* scratch) {
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      body(piece * grain, std::min(count, (piece + 1) * grain), scratch);
    }
  });
}

}  // namespace fi::cpu
