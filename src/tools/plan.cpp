// dualpipe-plan: schedules on the command line. Needs no LibTorch.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/render.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "dualpipe/version.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::plan {
namespace {

constexpr int bad_input = 1, bad_usage = 2;

/// What the command line says; one set for all subcommands, of which exactly one runs.
struct Options {
  ScheduleSpec spec;  // kind: also the path of a CSV file
  Publish publish = Publish::early;
  std::array<double, 4> costs{1, 2, 1, 3};
  double send = 0;
  std::string trace;
  std::string format;
  std::string color = "auto";
  std::string output;

  Costs all_costs() const {
    return {.forward = costs[0], .backward = costs[1], .weight = costs[2], .pair = costs[3], .send = send};
  }
};

std::string kinds() {
  std::string out;
  for (const std::string& kind : schedule_kinds()) out += (out.empty() ? "" : ", ") + kind;
  return out;
}

bool is_kind(const std::string& name) {
  return std::find(schedule_kinds().begin(), schedule_kinds().end(), name) != schedule_kinds().end();
}

/// From a generator, or from a file, which may be anything that can be read.
Schedule unchecked_schedule(const ScheduleSpec& spec) {
  if (is_kind(spec.kind)) {
    if (spec.num_ranks == 0 || spec.num_micro_batches == 0)
      throw CLI::ValidationError("--schedule " + spec.kind, "needs --ranks and --microbatches");
    return make_schedule(spec);
  }
  DUALPIPE_CHECK(::access(spec.kind.c_str(), F_OK) == 0, "no schedule '", spec.kind, "': neither a kind (", kinds(),
                 ") nor a file");
  const std::string text = read_file(spec.kind);
  Schedule schedule;
  try {
    schedule = from_csv(text, spec.kind);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(spec.kind + ": " + error.what());
  }
  const auto matches = [&](int asked, std::size_t found, const char* what) {
    DUALPIPE_CHECK(asked == 0 || static_cast<std::size_t>(asked) == found, spec.kind, " has ", found, " ", what,
                   ", not ", asked);
  };
  matches(spec.num_ranks, schedule.ranks.size(), "ranks");
  matches(spec.num_micro_batches, static_cast<std::size_t>(schedule.num_micro_batches), "micro-batches");
  return schedule;
}

Schedule schedule(const ScheduleSpec& spec) {
  Schedule result = unchecked_schedule(spec);
  check(result);
  return result;
}

std::string show(const Options& options) {
  const Schedule plan = schedule(options.spec);
  if (options.format == "csv") return to_csv(plan);
  if (options.format == "json") return json(plan);
  const Timeline timeline = simulate(plan, options.all_costs(), options.publish).timeline;
  if (options.format == "svg") return to_svg({timeline});
  const bool terminal = options.output.empty() && ::isatty(STDOUT_FILENO) == 1;
  const bool color = options.color == "always" || (options.color == "auto" && terminal);
  return describe(plan) + "; " + describe(options.all_costs(), options.publish) + "\n" + to_ascii(timeline, color) +
         summary(report(timeline));
}

std::string check_and_describe(const Options& options) {
  const Schedule plan = unchecked_schedule(options.spec);
  const std::vector<Violation> found = violations(plan);
  if (!found.empty()) {
    std::string message;
    try {
      check(plan);  // shows the first in its surroundings
    } catch (const InvalidArgument& error) {
      message = error.what();
    }
    message.erase(message.find_last_not_of('\n') + 1);
    for (std::size_t i = 1; i < found.size(); ++i) {
      message += i == 1 ? "\nfurther findings:" : "";
      message += detail::str("\n  ", found[i].rank >= 0 ? detail::str("rank ", found[i].rank, ", ") : "",
                             found[i].cell >= 0 ? detail::str("cell ", found[i].cell + 1, ": ") : "", found[i].message);
    }
    throw InvalidArgument(message);
  }
  const Program program = lower(plan, options.publish);
  dry_run(program);
  std::size_t steps = 0;
  for (const auto& rank : plan.ranks) steps += rank.size();
  return detail::str("valid: ", describe(plan), ", ", steps, " steps, ", program.order.size(),
                     " transfers; finishes with one transfer at a time per rank\n");
}

std::string lower_and_print(const Options& options) {
  const Program program = lower(schedule(options.spec), options.publish);
  dry_run(program);
  return options.format == "json" ? json(program) : text(program);
}

std::string simulate_and_print(const Options& options) {
  const Schedule plan = schedule(options.spec);
  const Timeline timeline = simulate(plan, options.all_costs(), options.publish).timeline;
  if (options.format == "svg") return to_svg({timeline});
  if (options.format == "trace") return to_trace(timeline);
  const Report result = report(timeline);
  if (options.format == "json") return json(result, false);
  return describe(plan) + "; " + describe(options.all_costs(), options.publish) + "\n" + text(result, 0);
}

std::string report_trace(const Options& options) {
  const std::string json_text = read_file(options.trace);
  Timeline timeline;
  try {
    timeline = from_trace(json_text);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(options.trace + ": " + error.what());
  }
  if (options.format == "svg") return to_svg({timeline});
  const Report result = report(timeline);
  return options.format == "json" ? json(result, true) : text(result, timeline.seconds_per_unit);
}

void add_schedule(CLI::App& command, Options& options) {
  command.add_option("schedule,--schedule", options.spec.kind, "kind (" + kinds() + ") or a CSV file")
      ->capture_default_str();
  command.add_option("--ranks", options.spec.num_ranks, "number of ranks; a CSV file has its own")
      ->check(CLI::PositiveNumber);
  command
      .add_option("--microbatches", options.spec.num_micro_batches, "micro-batches per step, both directions together")
      ->check(CLI::PositiveNumber);
  command.add_option("--chunks", options.spec.chunks_per_rank, "stages on each rank (interleaved)")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
}

void add_publish(CLI::App& command, Options& options) {
  command
      .add_option_function<std::string>(
          "--publish",
          [&options](const std::string& when) { options.publish = when == "early" ? Publish::early : Publish::atomic; },
          "when results leave a step: early, before its weight part, or atomic, at its end (default: early)")
      ->check(CLI::IsMember({"early", "atomic"}).description(""))
      ->option_text("early|atomic");
}

void add_costs(CLI::App& command, Options& options) {
  command
      .add_option("--costs", options.costs,
                  "durations of a forward, a backward, its weight part, and an overlapped pair (default: 1,2,1,3)")
      ->delimiter(',')
      ->option_text("F,B,W,FB");
  command.add_option("--send", options.send, "duration of a transfer between two ranks")->capture_default_str();
}

void add_output(CLI::App& command, Options& options, const std::vector<std::string>& formats) {
  if (formats.size() > 1) {
    std::string all;
    for (const std::string& format : formats) all += (all.empty() ? "" : "|") + format;
    command.add_option("--format", options.format, "what to print (default: " + formats.front() + ")")
        ->check(CLI::IsMember(formats).description(""))
        ->option_text(all);
  }
  command.add_option("--output", options.output, "write to this file instead of standard output")->option_text("FILE");
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Pipeline schedules: draw them, prove them free of deadlock, lower them to what each rank does, simulate them.\n"
      "Example: dualpipe-plan show --schedule dualpipe --ranks 8 --microbatches 20",
      "dualpipe-plan"};
  app.set_version_flag("--version", "dualpipe-plan " DUALPIPE_VERSION);
  app.require_subcommand(1);
  app.failure_message([](const CLI::App*, const CLI::Error& error) {
    return std::string("dualpipe-plan: ") + error.what() + " (--help tells more)\n";
  });
  app.footer("Exit codes: 0 fine, 1 bad input (a schedule, a file, a value), 2 wrong usage.");

  std::function<std::string(const Options&)> chosen;
  const auto command = [&](const char* name, const char* what, std::string (*perform)(const Options&)) -> CLI::App& {
    CLI::App& added = *app.add_subcommand(name, what);
    added.callback([&chosen, perform] { chosen = perform; });
    return added;
  };

  CLI::App& show_command =
      command("show", "draw a schedule, or write it as CSV in the text form of torch.distributed.pipelining", show);
  add_schedule(show_command, options);
  add_output(show_command, options, {"ascii", "csv", "svg", "json"});
  add_costs(show_command, options);
  add_publish(show_command, options);
  show_command.add_option("--color", options.color, "colours in ascii; auto: on a terminal")
      ->check(CLI::IsMember({"auto", "always", "never"}).description(""))
      ->option_text("auto|always|never");

  CLI::App& check_command = command(
      "check", "prove that a schedule is complete, in order and free of deadlock: check FILE.csv", check_and_describe);
  add_schedule(check_command, options);
  add_publish(check_command, options);
  add_output(check_command, options, {});

  CLI::App& lower_command = command(
      "lower", "print what runs: the global order of transfers and the instructions of each rank", lower_and_print);
  add_schedule(lower_command, options);
  add_output(lower_command, options, {"text", "json"});
  add_publish(lower_command, options);

  CLI::App& simulate_command = command(
      "simulate", "run a schedule with given costs: makespan, bubble and activations of each rank", simulate_and_print);
  add_schedule(simulate_command, options);
  add_output(simulate_command, options, {"text", "json", "svg", "trace"});
  add_costs(simulate_command, options);
  add_publish(simulate_command, options);

  CLI::App& report_command =
      command("report", "makespan, bubble, activations and hidden communication of a recorded trace", report_trace);
  report_command.add_option("trace", options.trace, "trace file (JSON), as simulate --format trace or a run writes it")
      ->required()
      ->option_text("FILE");
  add_output(report_command, options, {"text", "json", "svg"});

  try {
    app.parse(argc, argv);
    write_output(chosen(options), options.output);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : bad_usage;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "dualpipe-plan: out of memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "dualpipe-plan: %s\n", error.what());
  }
  return bad_input;
}

}  // namespace
}  // namespace dualpipe::plan

int main(int argc, char** argv) { return dualpipe::plan::run(argc, argv); }
