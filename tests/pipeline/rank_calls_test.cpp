// As different_calls_test.cpp, on every rank of a real launch.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <chrono>

#include "dualpipe/comm/socket.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::shared_ptr<Communicator> connect_for_calls(int epoch) {
  return connect_sockets(World::from_env(), {.name = "calls", .epoch = epoch, .timeout = std::chrono::minutes(1)});
}

TEST(RankCalls, AreNamedWhereTheyDiffer) {
  const auto comm = connect_for_calls(0);
  const Batch batch = random_batch(16, 3);
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, as_factory(layer));
  pipe->step(batch, squared_error());
  const bool odd = comm->rank() == 2;
  EXPECT_THAT(message_of([&] { odd ? pipe->evaluate(batch, squared_error()) : pipe->step(batch, squared_error()); }),
              HasSubstr("ranks call different methods: rank 0 calls step(), rank 2 calls evaluate()"));
  EXPECT_THAT(message_of([&] {
                if (odd) {
                  pipe->clip_grad_norm_(1);
                } else {
                  pipe->step(batch, squared_error());
                }
              }),
              HasSubstr("ranks call different methods: rank 0 calls step(), rank 2 calls clip_grad_norm_()"));
  pipe->step(batch, squared_error());
  pipe->clip_grad_norm_(1);
}

TEST(RankCalls, OneLeavesItsLoop) {
  const auto comm = connect_for_calls(1);
  const Batch batch = random_batch(16, 3);
  DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, as_factory(layer));
  pipe->step(batch, squared_error());
  if (comm->rank() == 2) return;
  EXPECT_THAT(
      message_of([&] { pipe->step(batch, squared_error()); }),
      AllOf(HasSubstr("rank 2 has left, having destroyed its communicator"), HasSubstr("this rank had called step()")));
}

}  // namespace
}  // namespace dualpipe::test
