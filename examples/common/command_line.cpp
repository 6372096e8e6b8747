#include "command_line.hpp"

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/generate.hpp"

namespace example {
namespace {

constexpr const char* kFooter =
    "\nA run ends after --steps or --minutes, whichever comes first; the learning rate follows that, so only runs that "
    "--steps ends\n"
    "repeat exactly (--minutes 0). The first weights and the order of the text depend on --seed alone, not on the "
    "schedule\n"
    "and not on how the ranks form pipelines.";

std::string schedule_help() {
  std::string kinds;
  for (const std::string& kind : dualpipe::schedule_kinds()) kinds += (kinds.empty() ? "" : ", ") + kind;
  return kinds + ", or a CSV file";
}

}  // namespace

CommandLine::CommandLine(const std::string& description, Options& options)
    : app_(description, options.program), options_(options) {
  app_.footer(kFooter);
  add_text();
  add_pipeline();
  add_model();
  add_training();
  add_output();
}

void CommandLine::add_text() {
  group("Text");
  flag("--text", options_.text, "PATH", "Files or folders to learn from (default: the headers of LibTorch)");
  flag("--seed", options_.seed, "N", "Of the first weights, the order of the text, dropout and the sample")
      ->capture_default_str();
}

void CommandLine::add_pipeline() {
  group("Pipeline");
  flag("--config", config_, "FILE", "JSON with num_ranks, num_micro_batches, schedule, ...; flags override it");
  flag("--schedule", schedule_, "KIND", schedule_help())->default_str(options_.pipe.schedule);
  count("--microbatches", micro_batches_, "Per step and pipeline, both directions together")
      ->default_str(std::to_string(options_.pipe.num_micro_batches));
  flag("--partition", options_.partition, "N,N,...",
       "Layers of each stage, one entry for each: how many, or by name as embedding:block3 (default: balanced by cost)")
      ->delimiter(',');
  count("--chunks", chunks_, "Stages per rank, --schedule interleaved only")
      ->default_str(std::to_string(options_.pipe.chunks_per_rank));
  flag("--publish", publish_, "WHEN", "When results leave a step: early (as soon as they exist) or atomic (at its end)")
      ->check(CLI::IsMember({"early", "atomic"}).description(""))
      ->default_str("early");
  flag("--device", device_, "DEVICE", "Where the ranks compute: cpu, or cuda, which needs a GPU for each of them")
      ->check(CLI::IsMember({"cpu", "cuda"}).description(""))
      ->capture_default_str();
  count("--data-parallel,--pipelines", options_.pipelines,
        "Pipelines side by side, which share the ranks evenly and train one model, each on its part of the batch")
      ->capture_default_str();
  app_.add_flag("--shard-optimizer", shard_optimizer_,
                "Keep each optimizer state on one of the ranks that hold the parameter, not on all of them")
      ->group(group_);
  number("--link-latency-ms", latency_milliseconds_, "A slower network: time that every message takes longer");
  number("--link-bandwidth", megabytes_per_second_, "A slower network: MB/s from each rank to each, 0: no limit");
}

void CommandLine::add_model() {
  group("Model");
  count("--layers", options_.model.layers, "Transformer blocks")->capture_default_str();
  count("--width", options_.model.width, "Features per byte")->capture_default_str();
  count("--heads", options_.model.heads, "Attention heads")->capture_default_str();
  count("--context", options_.model.context, "Bytes the model sees at once")->capture_default_str();
  flag("--dtype", dtype_, "DTYPE", "Of parameters and activations: float32, or bfloat16; losses are float32")
      ->check(CLI::IsMember({"float32", "fp32", "bfloat16", "bf16"}).description(""))
      ->capture_default_str();
}

void CommandLine::add_training() {
  group("Training");
  count("--steps", options_.steps, "Steps at most")->capture_default_str();
  number("--minutes", options_.minutes, "Minutes of training at most, 0: no limit");
  count("--batch", options_.batch, "Sequences per micro-batch")->capture_default_str();
  number("--lr", options_.learning_rate, "Highest learning rate of AdamW");
  number("--warm-up", options_.warm_up, "Share of the run in which the learning rate rises", 1);
  number("--weight-decay", options_.weight_decay, "Of AdamW");
  number("--dropout", options_.model.dropout, "Share of each branch that a step leaves out", 1);
  number("--clip", options_.clip, "Largest norm of the gradients, 0: any");
}

void CommandLine::add_output() {
  group("Output");
  flag("--checkpoint", options_.checkpoint, "FOLDER", "Checkpoints of the run, the last two");
  count("--checkpoint-every", options_.checkpoint_every, "Steps between checkpoints; the last step has one too")
      ->capture_default_str();
  app_.add_flag("--resume", options_.resume, "Go on from the last checkpoint in --checkpoint, if there is one")
      ->group(group_);
  flag("--metrics", options_.metrics, "FILE", "A line of JSON for each step, which dualpipe-plan plot draws");
  count("--held-out", options_.held_out, "Batches that measure the held-out loss")->capture_default_str();
  count("--sample", options_.sample, "Bytes of text to generate, 0: none", 0)->capture_default_str();
  number("--temperature", options_.temperature, "Of the sample, 0: always the likeliest byte");
  flag("--prompt", options_.prompt, "TEXT", "What the sample goes on from (default: the first held-out bytes)");
  options_.trace = "out/" + options_.program + ".trace.json";
  options_.svg = "out/" + options_.program + ".svg";
  flag("--trace", options_.trace, "FILE", "The last step for Chrome and Perfetto, \"\": none")->capture_default_str();
  flag("--svg", options_.svg, "FILE", "The last step, predicted above measured, \"\": none")->capture_default_str();
  number("--progress", options_.progress,
         "Seconds between lines of progress where stdout is no terminal, 0: each step");
  app_.add_flag("--quiet", options_.quiet, "No picture of the schedule, no progress")->group(group_);
}

std::optional<std::string> CommandLine::parse(int argc, const char* const* argv) {
  try {
    app_.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    return app_.help();
  } catch (const CLI::ParseError& error) {
    throw dualpipe::InvalidArgument(dualpipe::detail::str(error.what(), "; --help lists what there is"));
  }
  if (!config_.empty()) {
    const int micro_batches = options_.pipe.num_micro_batches;
    options_.pipe = dualpipe::DualPipeOptions::from_json_file(config_);
    if (options_.pipe.num_micro_batches == 0) options_.pipe.num_micro_batches = micro_batches;
    DUALPIPE_CHECK(options_.pipe.batch_dim == 0, config_,
                   ": \"batch_dim\" must be 0, the model takes [batch, length]; got ", options_.pipe.batch_dim);
  }
  if (app_.count("--seed") == 0) options_.seed = options_.pipe.seed.value_or(options_.seed);
  options_.pipe.seed = options_.seed;
  if (schedule_) options_.pipe.schedule = *schedule_;
  if (micro_batches_) options_.pipe.num_micro_batches = *micro_batches_;
  if (shard_optimizer_) options_.pipe.shard_optimizer = true;
  if (chunks_) options_.pipe.chunks_per_rank = *chunks_;
  if (publish_) options_.pipe.publish = *publish_ == "early" ? dualpipe::Publish::early : dualpipe::Publish::atomic;
  if (device_ == "cuda") options_.device = at::kCUDA;
  if (dtype_ == "bfloat16" || dtype_ == "bf16") options_.dtype = at::kBFloat16;
  options_.latency = std::chrono::nanoseconds(static_cast<std::int64_t>(latency_milliseconds_ * 1e6));
  check(options_.model);
  DUALPIPE_CHECK(!options_.resume || !options_.checkpoint.empty(),
                 "--resume needs --checkpoint FOLDER, which says where to go on from");
  options_.bytes_per_second = megabytes_per_second_ * 1e6;
  return std::nullopt;
}

}  // namespace example
