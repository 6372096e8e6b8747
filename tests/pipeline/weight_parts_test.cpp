#include <gmock/gmock.h>

#include <atomic>
#include <thread>

#include "pipeline.hpp"
#include "temporary_folder.hpp"

// Where weight parts run in stages that communicate: a collective here ends when a given number of them has run, so
// what is expected depends on no clock.
namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

/// What happened, in order.
using Log = std::vector<std::string>;

/// A collective that moves nothing. Its backward ends once `parts` weight parts have run since its launch.
class Slow final : public Collective {
 public:
  Slow(Log& log, int parts) : log_(log), parts_(parts) {}

  Launched forward(Tensors inputs, const StageContext& context) override {
    for (torch::Tensor& input : inputs) input = input.detach().clone().set_requires_grad(input.requires_grad());
    return {join({}, [inputs](std::vector<Tensors>) { return inputs; }), std::make_shared<int>(context.micro_batch)};
  }
  Pending backward(std::shared_ptr<void> handle, Tensors gradients) override {
    const std::string micro_batch = std::to_string(*std::static_pointer_cast<int>(handle));
    log_.push_back("launch " + micro_batch);
    return Pending(std::make_shared<State>(log_, parts_, micro_batch, std::move(gradients)));
  }

 private:
  class State final : public Pending::State {
   public:
    State(Log& log, int parts, std::string micro_batch, Tensors tensors)
        : log_(log), begin_(log.size()), parts_(parts), micro_batch_(std::move(micro_batch)), tensors_(tensors) {}
    void wait() override { EXPECT_TRUE(done()) << "the host waits instead of running weight parts"; }
    bool done() const override {
      return std::count_if(log_.begin() + static_cast<std::ptrdiff_t>(begin_), log_.end(),
                           [](const std::string& entry) { return entry[0] == 'w'; }) >= parts_;
    }
    Tensors take() override {
      wait();
      log_.push_back("take " + micro_batch_);
      return std::move(tensors_);
    }
    Span span() const override { return {}; }

   private:
    Log& log_;
    std::size_t begin_;
    int parts_;
    std::string micro_batch_;
    Tensors tensors_;
  };

  Log& log_;
  int parts_;
};

/// Linear layers one after the other; each says when its weight's gradient is accumulated.
struct LayersImpl : torch::nn::Module {
  LayersImpl(int count, Log& log) {
    for (int i = 0; i < count; ++i) {
      weights.push_back(register_parameter("weight" + std::to_string(i), seeded({kWidth, kWidth}, 10 + i)));
      weights.back().register_hook([&log, i](const torch::Tensor&) { log.push_back("w" + std::to_string(i)); });
    }
  }
  Compute part(int begin, int end) const {
    return [this, begin, end](const Tensors& x, const StageContext&) {
      torch::Tensor y = x[0];
      for (int i = begin; i < end; ++i) y = torch::tanh(y.mm(weights[static_cast<std::size_t>(i)]));
      return Tensors{y};
    };
  }
  Tensors weights;
};
TORCH_MODULE(Layers);

TEST(WeightParts, RunWhileACollectiveIsUnderWayAndNoLonger) {
  Log log;
  const Layers layers(5, log);
  Stage stage(layers.ptr());
  stage.compute("first", layers->part(0, 2))
      .communicate("slow", std::make_shared<Slow>(log, 2), {0})
      .compute("second", layers->part(2, 5));
  run_ranks(1, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 1, .schedule = "1f1b"}, [&](int) { return stage; });
    pipe->step(random_batch(2, 7), squared_error());
  });
  // Then the second node's last one; and of the first node, whose input has no gradient, what leads to its first layer.
  EXPECT_THAT(log, ElementsAre("launch 0", "w4", "w3", "take 0", "w2", "w0", "w1"));
}

TEST(WeightParts, HideTheCollectiveWithWhichTheNextBackwardBegins) {
  const dualpipe::test::TemporaryFolder folder;
  const std::string file = folder.write("two_forwards_first.csv", "0F0,0F1,0B0,0B1\n");
  for (const Publish publish : {Publish::early, Publish::atomic}) {
    Log log;
    const Layers layers(2, log);
    Stage stage(layers.ptr());
    stage.compute("compute", layers->part(0, 2)).communicate("slow", std::make_shared<Slow>(log, 0), {0});
    run_ranks(1, [&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 2, .schedule = file, .publish = publish},
                    [&](int) { return stage; });
      pipe->step(random_batch(2, 7), squared_error());
    });
    // The loss of the last stage is a node of its own: its backward comes before the collective's.
    const Log early{"launch 0", "take 0", "launch 1", "w0", "w1", "take 1", "w0", "w1"};
    const Log atomic{"launch 0", "take 0", "w0", "w1", "launch 1", "take 1", "w0", "w1"};
    EXPECT_THAT(log, ElementsAreArray(publish == Publish::early ? early : atomic));
  }
}

TEST(WeightParts, HideTheCollectiveOfAGradientThatComesWhileTheyRun) {
  const dualpipe::test::TemporaryFolder folder;
  const std::string file = folder.write("two_stages.csv", "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n");
  Log log;
  std::atomic<bool> began{false}, sent{false};
  std::atomic<int> weight_parts{0};  // of rank 1
  run_ranks(2, [&](std::shared_ptr<Communicator> comm) {
    const Batch batch = random_batch(2, 7);
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 2, .schedule = file}, [&](int number) {
      if (number == 0) {
        const Layers layers(2, log);
        // Rank 1 sends the second gradient while the first part of the first micro-batch runs.
        layers->weights[0].register_hook([&](const torch::Tensor&) {
          began = true;
          while (!sent) std::this_thread::yield();
        });
        Stage stage(layers.ptr());
        stage.compute("compute", layers->part(0, 2)).communicate("slow", std::make_shared<Slow>(log, 0), {0});
        return stage;
      }
      Layer layer(number);
      Stage stage(layer.ptr());
      stage.compute("layer",
                    [layer](const Tensors& x, const StageContext&) mutable { return Tensors{layer->forward(x[0])}; });
      // Weight parts come behind the gradient that is published.
      layer->weight.register_hook([&](const torch::Tensor&) {
        if (++weight_parts == 2) sent = true;
        while (!began) std::this_thread::yield();
      });
      return stage;
    });
    pipe->step(batch, squared_error());
  });
  EXPECT_THAT(log, ElementsAre("launch 0", "take 0", "w0", "launch 1", "w1", "take 1", "w0", "w1"));
}

TEST(WeightParts, HideTheCollectiveOfAGradientThatIsMadeOnTheSameRank) {
  const dualpipe::test::TemporaryFolder folder;
  const std::string file = folder.write("two_stages_on_a_rank.csv", "0F0,1F0,1B0,0B0\n");
  Log log;
  const Layers before(1, log), behind(2, log);
  run_ranks(1, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 1, .schedule = file}, [&](int number) {
      if (number == 1) return Stage(behind.ptr()).compute("compute", behind->part(0, 2));
      Stage stage(before.ptr());
      stage.compute("compute", before->part(0, 1)).communicate("slow", std::make_shared<Slow>(log, 2), {0});
      return stage;
    });
    pipe->step(random_batch(2, 7), squared_error());
  });
  EXPECT_THAT(log, ElementsAre("launch 0", "w1", "w0", "take 0", "w0"));
}

TEST(WeightParts, AnErrorInOneThatFillsAWaitNamesIt) {
  Log log;
  const Layers layers(3, log);
  layers->weights[2].register_hook(
      [](const torch::Tensor&) -> torch::Tensor { throw std::runtime_error("no gradient"); });
  Stage stage(layers.ptr());
  stage.compute("first", layers->part(0, 1))
      .communicate("slow", std::make_shared<Slow>(log, 2), {0})
      .compute("second", layers->part(1, 3));
  run_ranks(1, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe(comm, DualPipeOptions{.num_micro_batches = 1, .schedule = "1f1b"}, [&](int) { return stage; });
    EXPECT_THAT(message_of([&] { pipe->step(random_batch(2, 7), squared_error()); }),
                AllOf(HasSubstr("no gradient"), HasSubstr("weight backward of stage 0, node second, micro-batch 0")));
  });
}

}  // namespace
}  // namespace dualpipe::test
