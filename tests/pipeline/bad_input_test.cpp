// Wrong options and wrong data: one clear error, the same on every rank, before anything hangs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>

#include "dualpipe/stage/partition.hpp"
#include "pipeline/pipeline.hpp"
#include "temporary_folder.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string construction(int num_ranks, const DualPipeOptions& options) {
  return failure_on_all(num_ranks, [&](auto comm) { DualPipe(comm, options, as_factory(layer)); });
}

TEST(BadInput, Options) {
  EXPECT_THAT(construction(3, {.num_micro_batches = 8}),
              AllOf(HasSubstr("even number of ranks"), HasSubstr("3"), HasSubstr("dualpipev")));
  EXPECT_THAT(construction(4, {.num_micro_batches = 7}), AllOf(HasSubstr("even"), HasSubstr("7")));
  EXPECT_THAT(construction(4, {.num_micro_batches = 4}), HasSubstr("4"));
  EXPECT_THAT(construction(2, {}), HasSubstr("num_micro_batches must be at least 1, got 0"));
  EXPECT_THAT(construction(2, {.num_micro_batches = -4}), HasSubstr("-4"));
  EXPECT_THAT(construction(2, {.num_micro_batches = 4, .schedule = "dualpip"}),
              AllOf(HasSubstr("\"dualpip\" is neither a kind"), HasSubstr("dualpipev")));
  EXPECT_THAT(construction(2, {.num_micro_batches = 4, .num_ranks = 8}),
              HasSubstr("num_ranks is 8 but the communicator has 2"));
  EXPECT_THAT(construction(2, {.num_micro_batches = 4, .batch_dim = -1}), HasSubstr("batch_dim"));
}

TEST(BadInput, AModelInAnotherNumberOfStages) {
  EXPECT_THAT(failure_on_all(2,
                             [](auto comm) {
                               std::vector<NamedLayer> layers;
                               for (const std::string name : {"a", "b", "c"})
                                 layers.push_back({name, [] { return as_stage(torch::nn::Linear(4, 4)); }});
                               DualPipe(comm, DualPipeOptions{.num_micro_batches = 4}, split(layers, {1, 1, 1}));
                             }),
              HasSubstr("the model is cut into 3 stages, but dualpipe on 2 ranks has 2"));
}

TEST(BadInput, ACustomSchedule) {
  const dualpipe::test::TemporaryFolder folder;
  const std::string path = (folder / "own.csv").string();
  std::ofstream(path) << "0F0,0B0,0F1\n1F0,1B0,1F1,1B1\n";
  EXPECT_THAT(construction(2, {.num_micro_batches = 2, .schedule = path}), HasSubstr("0B1"));
  std::ofstream(path) << "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n";
  EXPECT_EQ(construction(2, {.num_micro_batches = 2, .schedule = path}), "");
  EXPECT_THAT(construction(2, {.num_micro_batches = 4, .schedule = path}),
              HasSubstr("has 2 micro-batches, num_micro_batches is 4"));
  EXPECT_THAT(construction(3, {.num_micro_batches = 2, .schedule = path}), HasSubstr("is for 2 ranks, there are 3"));
  std::remove(path.c_str());
}

TEST(BadInput, RanksThatDisagree) {
  const auto message = failure_on_all(4, [](auto comm) {
    DualPipe(comm, DualPipeOptions{.num_micro_batches = comm->rank() == 2 ? 10 : 8}, as_factory(layer));
  });
  EXPECT_THAT(message, AllOf(HasSubstr("disagree"), HasSubstr("num_micro_batches 8"), HasSubstr("rank 2"),
                             HasSubstr("num_micro_batches 10")));
  const auto batches = failure_on_all(4, [](auto comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, as_factory(layer));
    pipe->step(random_batch(16, comm->rank() == 3 ? 1 : 2), squared_error());
  });
  EXPECT_THAT(batches, AllOf(HasSubstr("ranks disagree about the batch"), HasSubstr("rank 3")));
}

TEST(BadInput, Batches) {
  const auto step = [](const Batch& batch) {
    return failure_on_all(2, [&](auto comm) {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 4}, as_factory(layer));
      pipe->step(batch, squared_error());
    });
  };
  EXPECT_THAT(step(random_batch(10, 1)),
              AllOf(HasSubstr("inputs[0] has 10 elements"), HasSubstr("4 micro-batches do not divide")));
  Batch undefined = random_batch(8, 1);
  undefined.targets[0] = torch::Tensor();
  EXPECT_THAT(step(undefined), HasSubstr("targets[0] is undefined"));
  Batch scalar = random_batch(8, 1);
  scalar.inputs[0] = torch::zeros({});
  EXPECT_THAT(step(scalar), HasSubstr("inputs[0] has 0 dimensions"));
  EXPECT_EQ(step(Batch::from_micro_batches({random_batch(2, 1), random_batch(2, 2)})), "");
  EXPECT_THAT(step(Batch{}), HasSubstr("empty batch"));
  EXPECT_EQ(step(random_batch(8, 1)), "");
}

TEST(BadInput, AnEmptyBatchOnOneRankNamesIt) {
  EXPECT_THAT(failure_on_all(2,
                             [](auto comm) {
                               DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 4}, as_factory(layer));
                               pipe->step(comm->rank() == 1 ? Batch{} : random_batch(8, 1), squared_error());
                             }),
              HasSubstr("rank 1 got an empty batch"));
}

TEST(BadInput, AStageThatReturnsAnotherNumberOfTensors) {
  std::atomic<int> named{0};
  run_ranks(4, [&](std::shared_ptr<Communicator> comm) {
    const auto message = message_of([&] {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 8}, [](int number) {
        Stage stage(layer(number).module);
        stage.takes(1).compute("pairs", [number](const Tensors& inputs, const StageContext&) {
          return number == 1 ? Tensors{inputs[0], inputs[0]} : inputs;
        });
        return stage;
      });
      pipe->step(random_batch(16, 1), squared_error());
    });
    if (message.find("stage 2 takes 1 tensor, got 2") != std::string::npos) ++named;
  });
  EXPECT_EQ(named, 4);
}

TEST(BadInput, ALossThatIsNoNumber) {
  std::atomic<int> named{0};
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 4}, as_factory(layer));
    const auto message = message_of(
        [&] { pipe->step(random_batch(8, 1), [](const Tensors& outputs, const Tensors&) { return outputs[0]; }); });
    if (message.find("must be one element") != std::string::npos) ++named;
  });
  EXPECT_EQ(named, 2);
}

TEST(BadInput, Json) {
  const auto options = DualPipeOptions::from_json(
      R"({"num_ranks": 8, "num_micro_batches": 20, "schedule": "1f1b", "publish": "atomic", "loss_reduction": "sum",
          "batch_dim": 1, "keep_outputs": true, "asynchronous": true, "chunks_per_rank": 3,
          "compare_replicas_every": 7, "seed": 18446744073709551615,
          "buffers": {"running_mean": "mean", "seen": "sum"}, "gradient_dtype": "float32", "on_non_finite": "keep",
          "shard_optimizer": true,
          "split": {"inputs": [{"dim": 1}, {"how": "whole"}], "extras": [{"how": "list"}]},
          "merge_outputs": [{"how": "stack", "dim": 1}, {"how": "list"}, {"dim": 2}]})");
  EXPECT_EQ(options.num_ranks, 8);
  EXPECT_EQ(options.num_micro_batches, 20);
  EXPECT_EQ(options.schedule, "1f1b");
  EXPECT_EQ(options.publish, Publish::atomic);
  EXPECT_EQ(options.loss_reduction, LossReduction::sum);
  EXPECT_EQ(options.batch_dim, 1);
  EXPECT_TRUE(options.keep_outputs);
  EXPECT_TRUE(options.asynchronous);
  EXPECT_EQ(options.chunks_per_rank, 3);
  EXPECT_EQ(options.compare_replicas_every, 7);
  EXPECT_EQ(options.seed, 18446744073709551615u);
  EXPECT_EQ(options.buffers, (std::map<std::string, BufferReduction>{{"running_mean", BufferReduction::mean},
                                                                     {"seen", BufferReduction::sum}}));
  EXPECT_EQ(options.gradient_dtype, GradientDtype::float32);
  EXPECT_EQ(options.on_non_finite, OnNonFinite::keep);
  EXPECT_TRUE(options.shard_optimizer);
  EXPECT_EQ(options.merge_outputs,
            (std::vector<Merge>{{Merge::How::stack, 1}, {Merge::How::list}, {Merge::How::concat, 2}}));

  EXPECT_EQ(options.split, (BatchSplit{.inputs = {{.dim = 1}, {Split::How::whole}}, .extras = {{Split::How::list}}}));

  const auto fails = [](const std::string& text) {
    return message_of([&] { DualPipeOptions::from_json(text, "run.json"); });
  };
  EXPECT_THAT(
      fails(R"({"num_microbatches": 20})"),
      AllOf(HasSubstr("run.json"), HasSubstr("unknown key \"num_microbatches\""), HasSubstr("num_micro_batches")));
  EXPECT_THAT(fails(R"({"num_micro_batches": "20"})"), AllOf(HasSubstr("must be an integer"), HasSubstr("\"20\"")));
  EXPECT_THAT(fails(R"({"num_micro_batches": 2.5})"), HasSubstr("2.5"));
  EXPECT_THAT(fails(R"({"num_micro_batches": -1})"), HasSubstr("-1"));
  EXPECT_THAT(fails(R"({"seed": -1})"), AllOf(HasSubstr("\"seed\" must be an integer >= 0"), HasSubstr("-1")));
  EXPECT_THAT(fails(R"({"num_micro_batches": 99999999999999999999})"), HasSubstr("must be an integer"));
  EXPECT_THAT(fails(R"({"num_micro_batches": 18446744073709551615})"), HasSubstr("must be an integer"));
  EXPECT_THAT(fails(R"({"publish": "never"})"), AllOf(HasSubstr("\"early\" or \"atomic\""), HasSubstr("never")));
  EXPECT_THAT(fails(R"({"gradient_dtype": "bfloat16"})"), HasSubstr("\"parameter\" or \"float32\""));
  EXPECT_THAT(fails(R"({"on_non_finite": true})"), HasSubstr("\"error\", \"skip\" or \"keep\""));
  EXPECT_THAT(fails(R"({"keep_outputs": 1})"), HasSubstr("true or false"));
  for (const char* merges :
       {R"("stack")", R"(["stack"])", R"([{"how": "sum"}])", R"([{"dim": -1}])", R"([{"dims": 1}])"})
    EXPECT_THAT(fails(detail::str("{\"merge_outputs\": ", merges, "}")),
                HasSubstr("\"concat\", \"stack\" or \"list\""));
  for (const char* split : {R"([])", R"({"outputs": []})", R"({"inputs": {}})", R"({"inputs": [{"how": "stack"}]})"})
    EXPECT_THAT(fails(detail::str("{\"split\": ", split, "}")), HasSubstr("\"chunk\", \"whole\" or \"list\""));
  EXPECT_THAT(fails(R"({"buffers": {"seen": "max"}})"), HasSubstr("\"broadcast\", \"sum\", \"mean\" or \"local\""));
  EXPECT_THAT(fails(R"({"num_ranks": 8, "num_ranks": 4})"), HasSubstr("the key \"num_ranks\" is named twice"));
  EXPECT_THAT(fails("[1]"), HasSubstr("object"));
  EXPECT_THAT(fails("{"), HasSubstr("not JSON: parse error at line 1, column 2"));
  EXPECT_THAT(message_of([] { DualPipeOptions::from_json_file("/nowhere/run.json"); }), HasSubstr("/nowhere/run.json"));
  EXPECT_THAT(message_of([] { DualPipeOptions::from_json_file("/"); }), HasSubstr("cannot read"));
}

}  // namespace
}  // namespace dualpipe::test
