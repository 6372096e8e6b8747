// What each rank did last: in errors, in files, and read by the planner.
#include "dualpipe/planner/record.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/detail/pipeline/flight_recorder.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "pipeline/pipeline.hpp"
#include "temporary_folder.hpp"

namespace dualpipe::test {
namespace {

using detail::FlightRecorder;
using planner::Record;
using ::testing::AllOf;
using ::testing::HasSubstr;

Record read_record(const std::filesystem::path& path) { return planner::from_record(detail::read_file(path)); }

std::vector<Record> records_in(const TemporaryFolder& folder, int num_ranks) {
  std::vector<Record> records;
  for (int rank = 0; rank < num_ranks; ++rank)
    records.push_back(read_record(folder / ("rank-" + std::to_string(rank) + ".json")));
  return records;
}

/// Stage 2 calls `body` with micro-batch 5, in the first forward only: that is rank 1.
StageFactory stopping(const std::function<void()>& body) {
  return [body](int number) {
    Layer module(number);
    return Stage(module).compute("layer", [=](const Tensors& x, const StageContext& context) mutable {
      if (context.stage == 2 && context.micro_batch == 5) body();
      return Tensors{module->forward(x[0])};
    });
  };
}

void wait_until(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(Records, HoldWhatTheProgramDoes) {
  const TemporaryFolder folder;
  const Batch batch = random_batch(16, 3);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches}, as_factory(layer));
    pipe->step(batch, squared_error());
    comm->barrier().wait();
    pipe->write_record(folder / ("rank-" + std::to_string(comm->rank()) + ".json"));
  });
  const Program program = lower(make_schedule({"dualpipe", kRanks, kMicroBatches}));
  const std::vector<Record> records = records_in(folder, kRanks);
  for (const Record& record : records) {
    SCOPED_TRACE(record.rank);
    EXPECT_EQ(record.ranks, (std::vector<int>{0, 1, 2, 3}));
    EXPECT_EQ(record.run, records.front().run);
    EXPECT_EQ(record.schedule, "dualpipe");
    EXPECT_EQ(record.num_stages, kRanks);
    EXPECT_EQ(record.num_micro_batches, kMicroBatches);
    EXPECT_EQ(record.failure, "");
    std::vector<Step> computed, expected;
    std::vector<std::string> transfers, expected_transfers, together;
    for (const Record::Operation& operation : record.operations) {
      EXPECT_GT(operation.issued_ns, 0);
      EXPECT_LE(operation.issued_ns, operation.began_ns);
      EXPECT_LE(operation.began_ns, operation.ended_ns);
      EXPECT_LE(operation.ended_ns, record.written_ns);
      if (operation.kind == Record::Kind::compute) computed.push_back(operation.step);
      if (operation.kind == Record::Kind::together) together.push_back(operation.name);
      if (operation.peer >= 0) transfers.push_back(planner::to_string(operation));
    }
    for (const Instruction& instruction : program.ranks[record.rank]) {
      if (instruction.what == Instruction::Do::compute) expected.push_back(instruction.step);
      const bool sends = instruction.what == Instruction::Do::send;
      if (!sends && instruction.what != Instruction::Do::receive) continue;
      const Transfer& transfer = program.order[instruction.transfer];
      // Two rows of six doubles.
      const std::string op = to_string(Op{detail::producer_of(transfer.payload), transfer.stage, transfer.micro_batch});
      expected_transfers.push_back(sends ? detail::str("send ", op, " to rank ", transfer.to, ", 96 bytes")
                                         : detail::str("receive ", op, " from rank ", transfer.from, ", 96 bytes"));
    }
    EXPECT_EQ(computed, expected);
    EXPECT_THAT(transfers, ::testing::UnorderedElementsAreArray(expected_transfers));
    EXPECT_THAT(together, ::testing::ElementsAre("connect", "broadcast of parameters", "begin of step()",
                                                 "comparison of copies", "sum of gradients", "vote"));
  }
  EXPECT_EQ(planner::find_straggler(records).verdict, "No rank waits for another.");
}

TEST(Records, OfAStageThatHangsNameItsRank) {
  const TemporaryFolder folder;
  const std::string path = folder / "made/by/the/pipeline";
  std::atomic<int> failed{0};
  const auto body = [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .record_to = path},
                  stopping([&] { wait_until([&] { return failed == kRanks - 1; }); }));
    const std::string message = message_of([&] { pipe->step(random_batch(16, 3), squared_error()); });
    ++failed;
    EXPECT_NE(message, "");
  };
  run_ranks(kRanks, body, {.timeout = std::chrono::milliseconds(500)});
  std::vector<Record> records;
  for (int rank = 0; rank < kRanks; ++rank)
    records.push_back(read_record(path + "/rank-" + std::to_string(rank) + ".json"));
  for (const Record& record : records) EXPECT_NE(record.failure, "");
  const planner::StragglerReport report = planner::find_straggler(records);
  EXPECT_EQ(report.stragglers, (std::vector<int>{1})) << report.verdict;
  EXPECT_THAT(report.verdict, AllOf(HasSubstr("Rank 1 was behind"), ::testing::ContainsRegex("in compute 2F5")));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(path), {}), kRanks);  // nothing but the records
}

TEST(Records, OfARankThatDoesNotCallWhatTheOthersDoNameIt) {
  const TemporaryFolder folder;
  std::atomic<bool> failed{false};
  const auto body = [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4, .record_to = folder.path()}, as_factory(layer));
    pipe->step(random_batch(8, 3), squared_error());
    if (comm->rank() == 1) wait_until([&] { return failed.load(); });
    EXPECT_THROW(pipe->clip_grad_norm_(1), CommError);
    failed = true;
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(8, 3), squared_error()); }),
                HasSubstr("an earlier step failed"));
  };
  run_ranks(2, body, {.timeout = std::chrono::milliseconds(500)});
  const planner::StragglerReport report = planner::find_straggler(records_in(folder, 2));
  EXPECT_EQ(report.stragglers, (std::vector<int>{1})) << report.verdict;
  EXPECT_EQ(report.ranks[0].now, "clip_grad_norm_");
  EXPECT_THAT(report.verdict, AllOf(HasSubstr("it ran code outside of the pipeline for"), HasSubstr("s, since vote")));
}

TEST(Records, OfARankThatHangsAfterErrorsThatAllHaveCaughtNameIt) {
  const TemporaryFolder folder;
  std::atomic<bool> failed{false};
  const auto body = [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4, .record_to = folder.path()}, as_factory(layer));
    const Batch batch = random_batch(8, 3);
    const bool hangs = comm->rank() == 1;
    pipe->step(batch, squared_error());
    for (const torch::Tensor& parameter : pipe->parameters()) parameter.mutable_grad().fill_(INFINITY);
    EXPECT_THROW(pipe->clip_grad_norm_(1, /*error_if_nonfinite=*/true), InvalidArgument);
    EXPECT_THROW(pipe->broadcast_batch({}), InvalidArgument);
    const auto differ = [&] {
      if (hangs)
        pipe->clip_grad_norm_(1);
      else
        pipe->step(batch, squared_error());
    };
    EXPECT_THROW(differ(), InvalidArgument);
    if (hangs) wait_until([&] { return failed.load(); });
    EXPECT_THROW(pipe->step(batch, squared_error()), CommError);
    failed = true;
  };
  run_ranks(2, body, {.timeout = std::chrono::milliseconds(500)});
  const planner::StragglerReport report = planner::find_straggler(records_in(folder, 2));
  EXPECT_EQ(report.stragglers, (std::vector<int>{1})) << report.verdict;
  EXPECT_EQ(report.ranks[0].now, "begin of step()");
  EXPECT_THAT(report.verdict, AllOf(HasSubstr("Rank 1 was behind"), HasSubstr("s, since clip_grad_norm_")));
}

TEST(Records, NumberWhatRanksDoTogetherAlikeAfterAStepWithInputGradients) {
  const TemporaryFolder folder;
  Batch batch = random_batch(16, 3);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .schedule = "1f1b"}, as_factory(layer));
    Batch with = batch;
    with.inputs = {batch.inputs[0].detach().clone().requires_grad_()};
    EXPECT_EQ(pipe->step(with, squared_error()).input_gradients.size(), pipe->feeds_inputs() ? 1 : 0);
    pipe->step(batch, squared_error());
    comm->barrier().wait();
    pipe->write_record(folder / ("rank-" + std::to_string(comm->rank()) + ".json"));
  });
  std::vector<std::vector<std::string>> together;
  for (const Record& record : records_in(folder, kRanks)) {
    std::vector<std::string>& names = together.emplace_back();
    for (const Record::Operation& operation : record.operations)
      if (operation.kind == Record::Kind::together) names.push_back(detail::str(operation.number, ' ', operation.name));
  }
  EXPECT_THAT(together.front(), ::testing::Contains(HasSubstr("gradients of inputs")));
  EXPECT_THAT(together, ::testing::Each(together.front()));
}

TEST(Records, OfAJobThatHangsAreWrittenByAnotherThread) {
  const TemporaryFolder folder;
  std::atomic<bool> hangs{false}, written{false};
  std::vector<DualPipe> pipes(kRanks, nullptr);
  std::thread watcher([&] {
    wait_until([&] { return hangs.load(); });
    // Until everybody has come to wait for rank 1, directly or not.
    wait_until([&] {
      for (int rank = 0; rank < kRanks; ++rank)
        pipes[rank]->write_record(folder / ("rank-" + std::to_string(rank) + ".json"));
      const auto report = planner::find_straggler(records_in(folder, kRanks));
      return std::count_if(report.ranks.begin(), report.ranks.end(), [](const auto& rank) { return rank.waits; }) ==
             kRanks - 1;
    });
    written = true;
  });
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    pipes[comm->rank()] = DualPipe(comm, {.num_micro_batches = kMicroBatches}, stopping([&] {
                                     hangs = true;
                                     wait_until([&] { return written.load(); });
                                   }));
    comm->barrier().wait();
    pipes[comm->rank()]->step(random_batch(16, 3), squared_error());
  });
  watcher.join();
  const planner::StragglerReport report = planner::find_straggler(records_in(folder, kRanks));
  EXPECT_EQ(report.stragglers, (std::vector<int>{1})) << report.verdict;
}

TEST(Records, OfAStageThatThrowsNameItsRankAndWhatItSaid) {
  const TemporaryFolder folder;
  const auto body = [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = kMicroBatches, .record_to = folder.path()},
                  stopping([] { throw std::runtime_error("no heads"); }));
    EXPECT_THAT(
        message_of([&] { pipe->step(random_batch(16, 3), squared_error()); }),
        AllOf(HasSubstr("no heads"), HasSubstr("rank 1 did last, in step 0:\n"), HasSubstr(" ms ago  began  compute")));
  };
  run_ranks(kRanks, body);
  const std::vector<Record> records = records_in(folder, kRanks);
  for (const Record& record : records) {
    EXPECT_THAT(record.failure, HasSubstr("no heads"));
    EXPECT_EQ(record.threw, record.rank == 1);
  }
  const planner::StragglerReport report = planner::find_straggler(records);
  EXPECT_THAT(report.ranks[1].now, HasSubstr("2F5"));
  EXPECT_THAT(report.verdict, AllOf(::testing::StartsWith("Rank 1 "),
                                    HasSubstr(" failed: rank 1: forward of stage 2, micro-batch 5: no heads.")));
}

TEST(Records, ThatCannotBeWrittenAreAnErrorBeforeAndANoteAfterwards) {
  const TemporaryFolder folder;
  folder.write("file", "");
  EXPECT_THAT(failure_on_all(2,
                             [&](std::shared_ptr<Communicator> comm) {
                               DualPipe pipe(comm, {.num_micro_batches = 4, .record_to = folder / "file/records"},
                                             as_factory(layer));
                             }),
              HasSubstr("record_to: cannot make the folder " + (folder / "file/records").string()));

  const std::string path = folder / "records";
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, {.num_micro_batches = 4, .record_to = path}, as_factory(layer));
    EXPECT_THROW(pipe->write_record(path + "/none/record.json"), InvalidArgument);
    comm->barrier().wait();
    if (comm->rank() == 0) std::filesystem::remove(path);
    comm->barrier().wait();
    const LossFn loss = [](const Tensors&, const Tensors&) -> at::Tensor { throw std::runtime_error("no loss today"); };
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(8, 3), loss); }),
                AllOf(HasSubstr("no loss today"), HasSubstr("The record of this rank is lost: cannot write " + path)));
  });
}

TEST(Records, AreARingOfTheLastOperations) {
  FlightRecorder recorder(3, {2, 3});
  recorder.describe("gpipe", 2, 4, 5);
  constexpr int count = 3 * static_cast<int>(FlightRecorder::capacity) / 2;
  const FlightRecorder::Id early = recorder.issue({.kind = FlightRecorder::Kind::receive, .step = {}, .peer = 2});
  for (int m = 0; m < count; ++m) recorder.end(recorder.start({.step = {{Pass::Forward, 1, m}, {}}}));
  const FlightRecorder::Id late = recorder.issue({.kind = FlightRecorder::Kind::receive, .step = {}, .peer = 2});
  recorder.begin(early);  // overwritten: nothing happens
  recorder.end(early, 7);
  const Record record = planner::from_record(recorder.to_json());
  ASSERT_EQ(record.operations.size(), FlightRecorder::capacity);
  EXPECT_EQ(record.operations.front().step.op.micro_batch, count + 1 - static_cast<int>(FlightRecorder::capacity));
  EXPECT_EQ(record.operations.back().peer, 2);
  EXPECT_EQ(record.operations.back().began_ns, 0);
  for (const Record::Operation& operation : record.operations) EXPECT_EQ(operation.bytes, -1);
  recorder.begin(late);
  recorder.end(late, 96);
  EXPECT_EQ(planner::from_record(recorder.to_json()).operations.back().bytes, 96);
  EXPECT_THAT(recorder.last_lines(2),
              ::testing::MatchesRegex("rank 3 did last, in step 0:\n +[0-9.]+ ms ago  ended  compute "
                                      "1F767\n +[0-9.]+ ms ago  ended  receive 0F0 from rank "
                                      "2, 96 bytes"));
}

TEST(Records, QuoteAnyText) {
  FlightRecorder recorder(0, {0});
  recorder.set_failure("a \"quote\", a \\, a\ttab,\na line and \xff", /*threw=*/false);
  recorder.set_failure("another", /*threw=*/true);
  EXPECT_FALSE(planner::from_record(recorder.to_json()).threw);
  EXPECT_EQ(planner::from_record(recorder.to_json()).failure, "a \"quote\", a \\, a\ttab,\na line and ?");
  EXPECT_EQ(recorder.last_lines(), "");
}

}  // namespace
}  // namespace dualpipe::test
