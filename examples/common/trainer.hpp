#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "corpus.hpp"
#include "dualpipe/launch/world.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/pipeline/tracer.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/stage/partition.hpp"
#include "dualpipe/train/checkpoint.hpp"
#include "dualpipe/train/mesh.hpp"
#include "options.hpp"
#include "report.hpp"

namespace example {

/// A language model as it is trained: int64 [batch, length] to logits of each position's next byte, [batch, length,
/// 256], as the first of its outputs.
struct Model {
  std::vector<dualpipe::NamedLayer> layers;
  std::vector<double> costs;          ///< of these layers, beside each other
  std::string description;            ///< "14 blocks, width 64, …"
  dualpipe::IsExpert is_expert = {};  ///< null: no parameter is
  /// From the outputs to what is added to the loss in training; null: nothing.
  std::function<torch::Tensor(const dualpipe::Tensors& outputs)> penalty = {};
  std::string penalty_name = {};
  std::map<std::string, dualpipe::BufferReduction> buffers = {};  ///< DualPipeOptions::buffers
  /// Called after each step on each rank; null: nothing. Gives what the routers of this rank's stages did in it.
  std::function<Routings(const torch::nn::Module& pipe)> after_step = {};
};
using MakeModel = std::function<Model(const dualpipe::Mesh& mesh)>;

/// One rank of a run: learns from a text, says how far it is, and shows at the end what the pipeline did.
class Trainer {
 public:
  /// Collective.
  ///
  /// @throws dualpipe::InvalidArgument  options that do not fit each other, the number of ranks, or the text.
  Trainer(const dualpipe::World& world, const Options& options, const MakeModel& make_model);

  void run();

 private:
  /// As printf, on rank 0 alone.
  template <class... Arguments>
  void say(const char* pattern, const Arguments&... arguments) const;
  void introduce() const;
  dualpipe::Timeline train();
  /// What the last checkpoint says, if the run goes on from one.
  std::optional<dualpipe::CheckpointExtra> resume(torch::optim::Optimizer& optimizer);
  /// Of all pipelines' last step: loss without penalty, and penalty.
  std::pair<double, double> loss_and_penalty(const dualpipe::StepResult& result);
  dualpipe::Timeline trace() const;
  double held_out_loss();
  void sample();
  /// Collective: which experts the bytes went to in the first step of this process and in the last.
  void report_routing() const;
  void report(dualpipe::Timeline measured) const;

  bool needs_data() const { return pipe_->feeds_inputs() || pipe_->computes_loss(); }
  /// Of one pipeline's step.
  std::int64_t sequences() const { return std::int64_t{options_.pipe.num_micro_batches} * options_.batch; }
  at::Device device() const { return mesh_.world()->device(); }
  double agree(double value) const;
  torch::Tensor prompt() const;

  dualpipe::World world_;
  Options options_;
  int num_stages_;
  Corpus corpus_;
  dualpipe::Mesh mesh_;
  Model model_;
  dualpipe::DualPipe pipe_;
  std::shared_ptr<dualpipe::Tracer> tracer_;
  Routings first_routing_, last_routing_;  // of this rank, as Model::after_step says
  torch::Tensor penalty_;                  // sum over the micro-batches that ended here in the step under way
};

/// What a program made of its arguments.
struct Program {
  Options options;
  MakeModel make_model;
};

/// The body of such a program's main().
///
/// @param parse  gives nothing where only the help was asked for, which it puts into `help`.
/// @return       the exit code.
int run_program(
    int argc, const char* const* argv,
    const std::function<std::optional<Program>(int argc, const char* const* argv, std::string& help)>& parse);

}  // namespace example
