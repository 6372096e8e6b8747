// Many pipelines and many failures leave nothing behind, and threads that cannot start are an error on all ranks.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <torch/torch.h>

#include <atomic>
#include <cerrno>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "dualpipe/schedule/generate.hpp"
#include "pipeline/pipeline.hpp"
#include "pipeline/resources.hpp"
#include "temporary_folder.hpp"

namespace dualpipe::test {
namespace {

/// How many threads may still be started; negative: any number.
std::atomic<int> threads_left{-1};

using ::testing::HasSubstr;

constexpr int kRounds = 100;

/// Runs `round` until it has done everything for the first time, then `kRounds` times.
void expect_nothing_left(const std::function<void()>& round) {
  for (int warm_up = 0; warm_up < 10; ++warm_up) round();
  const Resources before = Resources::now();
  for (int i = 0; i < kRounds; ++i) round();
  const Resources after = Resources::now();
  EXPECT_EQ(after.descriptors, before.descriptors);
  EXPECT_EQ(after.threads, before.threads);
  EXPECT_LT(after.resident_bytes, before.resident_bytes + (std::int64_t{32} << 20));
}

TEST(Limits, PipelinesThatEndLeaveNothing) {
  const Batch batch = random_batch(8, 3);
  expect_nothing_left([&] {
    std::vector<std::weak_ptr<torch::nn::Module>> modules(4);
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, {.num_micro_batches = 4}, [&](int stage) {
        Layer module(stage);
        modules[2 * comm->rank() + stage] = module.ptr();
        return module;
      });
      pipe->step(batch, squared_error());
      pipe->evaluate(batch, squared_error());
    });
    for (const auto& module : modules) EXPECT_TRUE(module.expired());
  });
}

TEST(Limits, StepsThatFailLeaveNothing) {
  const Batch batch = random_batch(8, 3);
  expect_nothing_left([&] {
    c10::weak_intrusive_ptr<at::TensorImpl> kept(at::empty({0}).getIntrusivePtr());
    std::mutex mutex;
    run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, {.num_micro_batches = 4}, [&](int number) {
        Layer module(number);
        return Stage(module).compute("layer", [&, module](const Tensors& x, const StageContext& context) mutable {
          const at::Tensor y = module->forward(x[0]);
          if (context.stage == 1 && context.micro_batch == 1) {
            const std::lock_guard lock(mutex);
            kept = c10::weak_intrusive_ptr<at::TensorImpl>(y.getIntrusivePtr());
            throw std::runtime_error("boom");
          }
          return Tensors{y};
        });
      });
      EXPECT_THAT(message_of([&] { pipe->step(batch, squared_error()); }), HasSubstr("boom"));
    });
    EXPECT_TRUE(kept.expired());
  });
}

/// The schedules of all ranks, by address.
std::set<const Schedule*> schedules_of(int num_ranks, const DualPipeOptions& options) {
  std::mutex mutex;
  std::set<const Schedule*> schedules;
  run_ranks(num_ranks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, options, [](int stage) { return Layer(stage); });
    comm->barrier().wait();  // all are alive
    const std::lock_guard lock(mutex);
    schedules.insert(&pipe->schedule());
  });
  return schedules;
}

TEST(Limits, RanksThatAreThreadsHoldOneSchedule) {
  EXPECT_EQ(schedules_of(4, {.num_micro_batches = 8}).size(), 1U);
  EXPECT_EQ(failure_on_all(2,
                           [](std::shared_ptr<Communicator> comm) {
                             DualPipe pipe(comm, {.num_micro_batches = 4 + 2 * comm->rank()}, as_factory(layer));
                           })
                .substr(0, 40),
            "ranks disagree about the options:\n  rank");
  const TemporaryFolder folder;
  const std::string path = folder.write("schedule.csv", to_csv(make_schedule({"1f1b", 2, 4})));
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    const auto make = [&](int num_micro_batches, const std::string& schedule) {
      return DualPipe(comm, {.num_micro_batches = num_micro_batches, .schedule = schedule}, as_factory(layer));
    };
    DualPipe four = make(4, "gpipe"), again = make(4, "gpipe"), six = make(6, "gpipe"), file = make(4, path);
    EXPECT_EQ(&four->schedule(), &again->schedule());
    EXPECT_EQ(six->schedule(), make_schedule({"gpipe", 2, 6}));
    EXPECT_EQ(file->schedule().ranks, make_schedule({"1f1b", 2, 4}).ranks);
    // A file that has changed meanwhile is read again.
    comm->barrier().wait();
    if (comm->rank() == 0) folder.write("schedule.csv", to_csv(make_schedule({"gpipe", 2, 4})));
    comm->barrier().wait();
    EXPECT_EQ(make(4, path)->schedule().ranks, make_schedule({"gpipe", 2, 4}).ranks);
    EXPECT_EQ(file->schedule().ranks, make_schedule({"1f1b", 2, 4}).ranks);
  });
}

TEST(Limits, ThreadsThatCannotStartAreAnErrorOnAllRanks) {
  std::mutex mutex;
  std::set<std::string> heard;
  threads_left = 3;
  const std::string message = message_of([&] {
    run_ranks(8, [&](std::shared_ptr<Communicator> comm) {
      const std::string text = message_of([&] { comm->barrier().wait(); });
      const std::lock_guard lock(mutex);
      heard.insert(text);
    });
  });
  threads_left = -1;
  const auto names_the_rank = HasSubstr("run_ranks cannot start a thread for rank 3 of 8: ");
  EXPECT_THAT(message, names_the_rank);
  EXPECT_THAT(message, HasSubstr("ulimit -u"));
  EXPECT_EQ(heard.size(), 3U);
  for (const std::string& text : heard) EXPECT_THAT(text, names_the_rank);
}

}  // namespace
}  // namespace dualpipe::test

/// In place of the system's, which this calls.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*),
                              void* argument) noexcept {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (dualpipe::test::threads_left == 0) return EAGAIN;
  if (dualpipe::test::threads_left > 0) --dualpipe::test::threads_left;
  return create(thread, attributes, body, argument);
}
