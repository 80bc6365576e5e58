// The engine's own threads: started on first use, kept, and started anew in a forked child.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace fi::cpu {

class ThreadPool {
 public:
  // The pool of this process. Never destroyed: joining threads at exit can deadlock in an
  // interpreter that is shutting down, and the system ends them anyway.
  static ThreadPool& instance();

  // Runs body(scratch) once on each of num_threads threads, the caller among them; `scratch` is
  // 64-byte aligned memory of scratch_bytes that the thread keeps between calls, zero when new.
  // Calls from several threads take turns. body must not throw.
  using Body = std::function<void(char* scratch)>;
  void run(int num_threads, size_t scratch_bytes, const Body& body);

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

 private:
  struct AlignedFree {
    void operator()(char* p) const;
  };
  struct Scratch {
    std::unique_ptr<char, AlignedFree> data;
    size_t bytes = 0;
  };

  ThreadPool() = default;
  void prepare(int num_threads, size_t scratch_bytes);
  void worker(int index, uint64_t seen_job);

  std::mutex turn_;  // held by the thread whose job is running
  std::mutex mutex_;
  std::condition_variable job_ready_, job_done_;
  uint64_t job_ = 0;     // counts jobs; a worker runs each once
  int job_threads_ = 0;  // workers [1, job_threads_) take part
  int running_ = 0;      // workers that have not finished
  const Body* body_ = nullptr;
  int num_workers_ = 0;
  std::vector<Scratch> scratch_;  // [0]: the caller's
};

// Splits [0, count) into pieces of `grain` that threads take in order of arrival.
void parallel_for(int num_threads, int64_t count, int64_t grain, size_t scratch_bytes,
                  const std::function<void(int64_t begin, int64_t end, char* scratch)>& body);

}  // namespace fi::cpu
