#include "options.hpp"

#include <CLI/CLI.hpp>
#include <map>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"

namespace lm {
namespace {

constexpr const char* kDescription =
    "Trains a byte-level transformer language model with a pipeline schedule, one process per rank:\n"
    "  dualpipe-run -n 8 -- dualpipe-lm\n"
    "  torchrun --nproc-per-node 8 --no-python dualpipe-lm --schedule 1f1b --microbatches 16\n";

constexpr const char* kFooter =
    "A run ends after --steps or --minutes, whichever comes first; the learning rate follows that, so only runs that "
    "--steps ends\n"
    "repeat exactly (--minutes 0). The first weights and the order of the text depend on --seed alone, not on the "
    "schedule.";

std::string schedule_help() {
  std::string kinds;
  for (const std::string& kind : dualpipe::schedule_kinds()) kinds += (kinds.empty() ? "" : ", ") + kind;
  return kinds + ", or a CSV file";
}

}  // namespace

std::optional<Options> parse(int argc, const char* const* argv, std::string& help) {
  Options options;
  const dualpipe::DualPipeOptions defaults = options.pipe;
  std::string config;
  std::optional<std::string> schedule;
  std::optional<int> micro_batches, chunks;
  std::optional<dualpipe::Publish> publish;

  CLI::App app(kDescription, "dualpipe-lm");
  app.footer(kFooter);
  const auto positive = CLI::Range(1, 1 << 30);
  const auto not_negative = CLI::Range(0.0, 1e9);

  auto* data = app.add_option_group("Text");
  data->add_option("--text", options.text, "Files or folders to learn from [default: the headers of LibTorch]")
      ->type_name("PATH...");
  data->add_option("--seed", options.seed, "Of the first weights, the order of the text and the sample")
      ->capture_default_str();

  auto* pipeline = app.add_option_group("Pipeline");
  pipeline->add_option("--config", config, "JSON with num_ranks, num_micro_batches, schedule, ...; flags override it")
      ->type_name("FILE");
  pipeline->add_option("--schedule", schedule, schedule_help())->default_str(defaults.schedule);
  pipeline->add_option("--microbatches", micro_batches, "Per step, both directions together")
      ->check(positive)
      ->default_str(std::to_string(defaults.num_micro_batches));
  pipeline->add_option("--chunks", chunks, "Stages per rank, --schedule interleaved only")
      ->check(positive)
      ->default_str(std::to_string(defaults.chunks_per_rank));
  pipeline->add_option("--publish", publish, "When results leave a step: early or atomic")
      ->transform(CLI::Transformer(std::map<std::string, dualpipe::Publish>{{"early", dualpipe::Publish::early},
                                                                            {"atomic", dualpipe::Publish::atomic}}))
      ->default_str("early");

  auto* model = app.add_option_group("Model");
  model->add_option("--layers", options.model.layers, "Transformer blocks")->check(positive)->capture_default_str();
  model->add_option("--width", options.model.width, "Features per byte")->check(positive)->capture_default_str();
  model->add_option("--heads", options.model.heads, "Attention heads")->check(positive)->capture_default_str();
  model->add_option("--context", options.model.context, "Bytes the model sees at once")
      ->check(positive)
      ->capture_default_str();

  auto* training = app.add_option_group("Training");
  training->add_option("--steps", options.steps, "Steps at most")->check(positive)->capture_default_str();
  training->add_option("--minutes", options.minutes, "Minutes of training at most, 0: no limit")
      ->check(not_negative)
      ->capture_default_str();
  training->add_option("--batch", options.batch, "Sequences per micro-batch")->check(positive)->capture_default_str();
  training->add_option("--lr", options.learning_rate, "Highest learning rate of AdamW")
      ->check(not_negative)
      ->capture_default_str();
  training->add_option("--warm-up", options.warm_up, "Share of the run in which the learning rate rises")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  training->add_option("--weight-decay", options.weight_decay, "Of AdamW")->check(not_negative)->capture_default_str();
  training->add_option("--clip", options.clip, "Largest norm of the gradients, 0: any")
      ->check(not_negative)
      ->capture_default_str();

  auto* output = app.add_option_group("Output");
  output->add_option("--held-out", options.held_out, "Batches that measure the held-out loss")
      ->check(positive)
      ->capture_default_str();
  output->add_option("--sample", options.sample, "Bytes of text to generate, 0: none")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  output->add_option("--temperature", options.temperature, "Of the sample, 0: always the likeliest byte")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  output->add_option("--prompt", options.prompt, "What the sample goes on from [default: the first held-out bytes]");
  output->add_option("--trace", options.trace, "Last step for Chrome and Perfetto, \"\": none")
      ->type_name("FILE")
      ->capture_default_str();
  output->add_option("--svg", options.svg, "Last step, predicted above measured, \"\": none")
      ->type_name("FILE")
      ->capture_default_str();
  output->add_flag("--quiet", options.quiet, "No picture of the schedule, no line per step");

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    help = app.help();
    return std::nullopt;
  } catch (const CLI::ParseError& error) {
    throw dualpipe::InvalidArgument(dualpipe::detail::str(error.what(), "; --help lists what there is"));
  }

  if (!config.empty()) {
    options.pipe = dualpipe::DualPipeOptions::from_json_file(config);
    if (options.pipe.num_micro_batches == 0) options.pipe.num_micro_batches = defaults.num_micro_batches;
    DUALPIPE_CHECK(options.pipe.batch_dim == 0, config,
                   ": \"batch_dim\" must be 0, the model takes [batch, length]; got ", options.pipe.batch_dim);
  }
  if (schedule) options.pipe.schedule = *schedule;
  if (micro_batches) options.pipe.num_micro_batches = *micro_batches;
  if (chunks) options.pipe.chunks_per_rank = *chunks;
  if (publish) options.pipe.publish = *publish;
  check(options.model);
  return options;
}

}  // namespace lm
