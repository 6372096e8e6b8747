// Trains a byte-level language model with experts spread over several DualPipe pipelines, one process per rank. See
// `dualpipe-moe --help`.

#include "command_line.hpp"
#include "dualpipe/error.hpp"
#include "model.hpp"
#include "trainer.hpp"

namespace {

constexpr const char* kDescription =
    "Trains a byte-level mixture-of-experts language model: pipelines side by side, whose ranks at the same place "
    "share "
    "the experts\n"
    "of their stages and send bytes to each other while they compute something else:\n"
    "  dualpipe-run -n 8 -- dualpipe-moe\n"
    "  dualpipe-run -n 8 -- dualpipe-moe --link-latency-ms 5 --microbatches 16\n";

struct Options : example::Options {
  Options() {
    program = "dualpipe-moe";
    pipe.num_micro_batches = 12;
    pipelines = 2;
    model = moe::ModelSize().transformer;
  }
  moe::ModelSize sizes;
  double balance = 0.01;
  std::optional<int> num_sharing_asked;
};

std::optional<example::Program> parse(int argc, const char* const* argv, std::string& help) {
  Options options;
  example::CommandLine line(kDescription, options);
  line.group("Pipeline");
  line.count("--expert-parallel", options.num_sharing_asked, "Pipelines that share one set of experts")
      ->default_str("all");
  line.group("Model");
  line.count("--experts", options.sizes.experts, "Experts of each block")->capture_default_str();
  line.count("--top-k", options.sizes.top_k, "Experts that each byte goes to")->capture_default_str();
  line.count("--expert-width", options.sizes.expert_width, "Hidden features of an expert")->capture_default_str();
  line.group("Training");
  line.number("--balance", options.balance, "Weight of the load-balance loss");
  line.number("--balance-bias", options.sizes.bias_rate,
              "By which the bias of an expert changes after each step, against its load");
  if (const auto text = line.parse(argc, argv)) {
    help = *text;
    return std::nullopt;
  }
  options.num_sharing = options.num_sharing_asked.value_or(options.pipelines);
  options.sizes.transformer = options.model;
  check(options.sizes, options.num_sharing);
  const auto make_model = [size = options.sizes, seed = options.seed,
                           factor = options.balance](const dualpipe::Mesh& mesh) {
    return example::Model{
        .layers = moe::layers_of(size, seed, mesh.expert()),
        .costs = moe::layer_costs(size),
        .description = moe::description(size),
        .is_expert = moe::is_expert,
        .penalty = [factor](const dualpipe::Tensors& outputs) { return factor * outputs[moe::balance].sum(); },
        .penalty_name = "balance loss",
        .buffers = moe::buffers(),
        .after_step = moe::adjust_biases,
    };
  };
  return example::Program{options, make_model};
}

}  // namespace

int main(int argc, char** argv) { return example::run_program(argc, argv, parse); }
