#include "options.hpp"

#include <CLI/CLI.hpp>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"

namespace lm {
namespace {

constexpr const char* kDescription =
    "Trains a byte-level transformer language model with a pipeline schedule, one process per rank:\n"
    "  dualpipe-run -n 8 -- dualpipe-lm\n"
    "  torchrun --nproc-per-node 8 --no-python dualpipe-lm --schedule 1f1b --microbatches 16\n";

constexpr const char* kFooter =
    "\nA run ends after --steps or --minutes, whichever comes first; the learning rate follows that, so only runs that "
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

  std::optional<std::string> publish;

  CLI::App app(kDescription, "dualpipe-lm");
  app.footer(kFooter);
  std::string group;
  const auto flag = [&](const char* name, auto& value, const char* type, const std::string& text) {
    return app.add_option(name, value, text)->type_name(type)->group(group);
  };
  // Without description: the help shows the defaults instead, the errors name the range.
  const auto count = [&](const char* name, auto& value, const std::string& text, int least = 1) {
    return flag(name, value, "N", text)->check(CLI::Range(least, 1'000'000).description(""));
  };
  const auto number = [&](const char* name, double& value, const std::string& text, double most = 1e6) {
    flag(name, value, "X", text)->check(CLI::Range(0.0, most).description(""))->capture_default_str();
  };

  group = "Text";
  flag("--text", options.text, "PATH", "Files or folders to learn from (default: the headers of LibTorch)");
  flag("--seed", options.seed, "N", "Of the first weights, the order of the text and the sample")
      ->capture_default_str();

  group = "Pipeline";
  flag("--config", config, "FILE", "JSON with num_ranks, num_micro_batches, schedule, ...; flags override it");
  flag("--schedule", schedule, "KIND", schedule_help())->default_str(defaults.schedule);
  count("--microbatches", micro_batches, "Per step, both directions together")
      ->default_str(std::to_string(defaults.num_micro_batches));
  count("--chunks", chunks, "Stages per rank, --schedule interleaved only")
      ->default_str(std::to_string(defaults.chunks_per_rank));
  flag("--publish", publish, "WHEN", "When results leave a step: early (as soon as they exist) or atomic (at its end)")
      ->check(CLI::IsMember({"early", "atomic"}).description(""))
      ->default_str("early");

  group = "Model";
  count("--layers", options.model.layers, "Transformer blocks")->capture_default_str();
  count("--width", options.model.width, "Features per byte")->capture_default_str();
  count("--heads", options.model.heads, "Attention heads")->capture_default_str();
  count("--context", options.model.context, "Bytes the model sees at once")->capture_default_str();

  group = "Training";
  count("--steps", options.steps, "Steps at most")->capture_default_str();
  number("--minutes", options.minutes, "Minutes of training at most, 0: no limit");
  count("--batch", options.batch, "Sequences per micro-batch")->capture_default_str();
  number("--lr", options.learning_rate, "Highest learning rate of AdamW");
  number("--warm-up", options.warm_up, "Share of the run in which the learning rate rises", 1);
  number("--weight-decay", options.weight_decay, "Of AdamW");
  number("--clip", options.clip, "Largest norm of the gradients, 0: any");

  group = "Output";
  count("--held-out", options.held_out, "Batches that measure the held-out loss")->capture_default_str();
  count("--sample", options.sample, "Bytes of text to generate, 0: none", 0)->capture_default_str();
  number("--temperature", options.temperature, "Of the sample, 0: always the likeliest byte");
  flag("--prompt", options.prompt, "TEXT", "What the sample goes on from (default: the first held-out bytes)");
  flag("--trace", options.trace, "FILE", "The last step for Chrome and Perfetto, \"\": none")->capture_default_str();
  flag("--svg", options.svg, "FILE", "The last step, predicted above measured, \"\": none")->capture_default_str();
  app.add_flag("--quiet", options.quiet, "No picture of the schedule, no line per step")->group(group);

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
  if (publish) options.pipe.publish = *publish == "early" ? dualpipe::Publish::early : dualpipe::Publish::atomic;
  check(options.model);
  return options;
}

}  // namespace lm
