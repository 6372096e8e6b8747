#include "tools/plan/costs.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string_view>
#include <utility>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/cost_file.hpp"
#include "dualpipe/planner/trace.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

double parse_number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const double value = std::strtod(text.c_str(), &end);
  const bool overflow = errno == ERANGE && std::isinf(value);
  if (text.empty() || end != text.c_str() + text.size())
    throw CLI::ValidationError(option, "'" + text + "' is not a number");
  DUALPIPE_CHECK(!overflow, option, ": ", text, " is beyond what a number can hold");
  return value;
}

int parse_index(const std::string& option, const std::string& text) {
  const double value = parse_number(option, text);
  constexpr double most = 1 << 30;
  DUALPIPE_CHECK(value == std::floor(value) && std::abs(value) <= most, option, ": ", text, " is no whole number");
  return static_cast<int>(value);
}

std::vector<std::string> parts(std::string_view text, char separator) {
  std::vector<std::string> result;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(separator, at), text.size());
    result.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  return result;
}

template <std::size_t Count>
std::array<double, Count> parse_numbers(const std::string& option, const std::string& text, const char* form) {
  const std::vector<std::string> given = parts(text, ',');
  if (given.size() != Count)
    throw CLI::ValidationError(
        option, "takes " + std::to_string(Count) + " numbers (" + form + "), got " + std::to_string(given.size()));
  std::array<double, Count> numbers{};
  for (std::size_t i = 0; i < Count; ++i) numbers[i] = parse_number(option, given[i]);
  return numbers;
}

/// PLACE:NUMBER
std::pair<std::string, double> parse_entry(const std::string& option, const std::string& text, const char* form) {
  const std::size_t colon = text.find(':');
  if (colon == std::string::npos) throw CLI::ValidationError(option, "takes " + std::string(form) + ", got " + text);
  return {text.substr(0, colon), parse_number(option, text.substr(colon + 1))};
}

/// Negative places count from the end.
int parse_place(const std::string& option, const std::string& text, int count, const char* what) {
  const int place = parse_index(option, text);
  DUALPIPE_CHECK(place < count && place >= -count, option, ": there is no ", what, " ", place, " of ", count);
  return place >= 0 ? place : place + count;
}

/// A duration that must not be zero; check finds all other errors.
void check_takes_time(const char* what, double duration) {
  DUALPIPE_CHECK(duration != 0, "the cost of ", what, " must be positive, got ", duration);
}

CostModel from_numbers(const std::string& text) {
  const auto [forward, backward, weight, pair] = parse_numbers<4>("--costs", text, "F,B,W,FB");
  check_takes_time("forward", forward);
  check_takes_time("backward", backward);
  check_takes_time("pair", pair);
  CostModel model;
  model.time = {.forward = forward, .backward = backward, .weight = weight, .pair = pair};
  return model;
}

/// True also of a single number, or of numbers and something else: errors then speak of numbers.
bool looks_like_numbers(const std::string& text) {
  if (::access(text.c_str(), F_OK) == 0) return false;
  char* end = nullptr;
  std::strtod(text.c_str(), &end);
  return text.find(',') != std::string::npos || (!text.empty() && *end == '\0');
}

void scale_stage(CostModel& model, int stage, double factor, int num_stages) {
  Costs& time = model.time;
  DUALPIPE_CHECK(std::isfinite(factor) && factor > 0, "--stage-scale: a stage's factor must be positive, got ", factor);
  if (time.stages.empty()) time.stages.assign(num_stages, {time.forward, time.backward, time.weight});
  StageCosts& costs = time.stages[stage];
  for (double* cost : {&costs.forward, &costs.backward, &costs.weight}) *cost *= factor;
  std::erase_if(time.pairs, [&](const PairCost& pair) { return pair.forward == stage || pair.backward == stage; });
}

/// "1", or "1 to 1.5"
std::string range(const std::vector<double>& durations, double seconds_per_unit) {
  const auto [least, most] = std::minmax_element(durations.begin(), durations.end());
  const std::string low = time(*least, seconds_per_unit), high = time(*most, seconds_per_unit);
  return low == high ? low : low + " to " + high;
}

}  // namespace

CostModel read_cost_file(const std::string& path) {
  const std::string text = detail::read_file(path);
  try {
    if (text.find("\"traceEvents\"") == std::string::npos) return read_costs(text);
    MeasuredCosts measured = measure_costs(from_trace(text));
    for (const std::string& note : measured.notes)
      std::fprintf(stderr, "dualpipe-plan: %s: %s\n", path.c_str(), note.c_str());
    return {std::move(measured.costs), {}, std::move(measured.sizes)};
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

const CostModel& CostOptions::base() const {
  if (!base_) base_ = looks_like_numbers(costs) ? from_numbers(costs) : read_cost_file(costs);
  return *base_;
}

CostModel CostOptions::of(const Schedule& schedule) const {
  return of(static_cast<int>(schedule.ranks.size()), schedule.num_stages);
}

CostModel CostOptions::of(int num_ranks, int num_stages) const {
  CostModel model = base();
  Costs& time = model.time;
  DUALPIPE_CHECK(time.stages.empty() || static_cast<int>(time.stages.size()) == num_stages, costs, " has costs of ",
                 time.stages.size(), " stages, here there are ", num_stages,
                 "; 'compare' spreads them over any number of stages");
  if (send) {
    time.send = *send;
    time.sends.clear();
  }
  if (!ready.empty()) {
    const auto [activation, gradient] = parse_numbers<2>("--pair-ready", ready, "activation,gradient");
    time.ready = {activation, gradient};
  }
  if (!memory.empty()) {
    const auto [activation, weight, state] = parse_numbers<3>("--memory", memory, "activation,weight part,state");
    model.memory = {activation, weight, state, {}};
  }
  if (!parameters.empty()) {
    model.sizes.clear();
    for (const double count : parameters) {
      DUALPIPE_CHECK(std::isfinite(count) && count >= 0, "--parameters: a stage has ", count, " parameters");
      model.sizes.push_back({.parameters = count});
    }
  }
  DUALPIPE_CHECK(model.sizes.empty() || std::ssize(model.sizes) == num_stages, "parameters of ", model.sizes.size(),
                 " stages, here there are ", num_stages);
  if (parameter_bytes) {
    DUALPIPE_CHECK(std::isfinite(*parameter_bytes) && *parameter_bytes >= 0,
                   "--parameter-bytes must be finite and not negative, got ", *parameter_bytes);
    DUALPIPE_CHECK(!model.sizes.empty(),
                   "--parameter-bytes needs to know how many parameters each stage has: "
                   "--parameters N,N,..., or a costs file or trace that says it");
    MemoryCosts& amounts = model.memory;
    amounts.stages.resize(num_stages, {amounts.activation, amounts.weight, amounts.state});
    for (int stage = 0; stage < num_stages; ++stage)
      amounts.stages[stage].state = *parameter_bytes * model.sizes[stage].parameters;
  }
  if (recompute) model = recomputed(std::move(model), *recompute);
  if (shard_optimizer) {
    model.memory.sharded = optimizer_share;
    model.memory.replicas = replicas;
    DUALPIPE_CHECK(model.memory.state > 0 || !model.memory.stages.empty(),
                   "--shard-optimizer needs to know what a stage's parameters, gradients and optimizer take: --memory "
                   "ACTIVATION,WEIGHT,STATE, or a costs file that has memory");
  }
  for (const std::string& entry : stage_scale) {
    const auto [place, factor] = parse_entry("--stage-scale", entry, "STAGE:FACTOR");
    scale_stage(model, parse_place("--stage-scale", place, num_stages, "stage"), factor, num_stages);
  }
  for (const std::string& entry : boundary_send) {
    const auto [place, duration] = parse_entry("--boundary-send", entry, "BOUNDARY:DURATION");
    time.sends.push_back(
        {.boundary = parse_place("--boundary-send", place, num_stages - 1, "boundary"), .duration = duration});
  }
  for (const std::string& entry : links) {
    const auto [place, duration] = parse_entry("--link", entry, "RANK-RANK:DURATION");
    const std::vector<std::string> ends = parts(place, '-');
    if (ends.size() != 2) throw CLI::ValidationError("--link", "takes RANK-RANK:DURATION, got " + entry);
    time.sends.push_back({.rank_a = parse_place("--link", ends[0], num_ranks, "rank"),
                          .rank_b = parse_place("--link", ends[1], num_ranks, "rank"),
                          .duration = duration});
  }
  for (const std::string& entry : stragglers) {
    const auto [place, factor] = parse_entry("--straggler", entry, "RANK:FACTOR");
    const int rank = parse_place("--straggler", place, num_ranks, "rank");
    if (std::ssize(time.slowdown) <= rank) time.slowdown.resize(rank + 1, 1);
    time.slowdown[rank] *= factor;
  }
  check(time, num_ranks, num_stages);
  check(model.memory, num_stages);
  return model;
}

int CostOptions::listed_stages() const {
  const CostModel& model = base();
  return static_cast<int>(
      std::max({model.time.stages.size(), model.memory.stages.size(), model.sizes.size(), parameters.size()}));
}

void add_costs(CLI::App& command, CostOptions& costs) {
  command
      .add_option(
          "--costs", costs.costs,
          "durations of a forward, a backward, its weight part, and an overlapped pair (default: 1,2,1,3); or a "
          "file: costs as JSON, or a trace to measure them from ('costs --help' tells more)")
      ->option_text("F,B,W,FB|FILE");
  command.add_option("--send", costs.send, "duration of a transfer between two ranks (default: 0, or the file's)");
  command
      .add_option("--stage-scale", costs.stage_scale,
                  "stages that take longer or shorter, by this factor: 0:1.3,-1:1.5 for the first and the last")
      ->delimiter(',')
      ->option_text("STAGE:FACTOR,...");
  command
      .add_option("--boundary-send", costs.boundary_send,
                  "transfers between stage B and B+1 that take another time than --send")
      ->delimiter(',')
      ->option_text("B:DURATION,...");
  command
      .add_option("--link", costs.links, "transfers between two ranks that take another time: 3-4:0.5 for a slow link")
      ->delimiter(',')
      ->option_text("RANK-RANK:DURATION,...");
  command.add_option("--straggler", costs.stragglers, "ranks that compute slower, by this factor")
      ->delimiter(',')
      ->option_text("RANK:FACTOR,...");
  command
      .add_option("--parameters", costs.parameters,
                  "how many each stage has (default: as a costs file or a trace says)")
      ->delimiter(',')
      ->option_text("N,N,...");
  command
      .add_option("--pair-ready", costs.ready,
                  "when the results of a pair leave it, as fractions of its duration (default: before its weight part)")
      ->option_text("ACTIVATION,GRADIENT");
}

void add_memory(CLI::App& command, CostOptions& costs) {
  command
      .add_option("--memory", costs.memory,
                  "memory of a stage for each activation that it holds, for each weight part that waits, and for its "
                  "parameters and optimizer (default: 1,0,0, or the file's)")
      ->option_text("ACTIVATION,WEIGHT,STATE");
  command
      .add_option(
          "--parameter-bytes", costs.parameter_bytes,
          "STATE is so much for each parameter of the stage, as 18 for bfloat16 weights, float32 gradients, and "
          "AdamW with float32 weights; then activations are in bytes too")
      ->option_text("X");
}

void add_recompute(CLI::App& command, CostOptions& costs) {
  command
      .add_option("--recompute", costs.recompute,
                  "stages are computed again before their backward, which takes another forward; so much stays of an "
                  "activation in between")
      ->option_text("KEPT");
}

void add_sharding(CLI::App& command, CostOptions& costs) {
  CLI::Option* shard = command.add_flag(
      "--shard-optimizer", costs.shard_optimizer,
      "each rank that holds a stage, in all replicas, keeps an even part of the optimizer's share of STATE");
  command
      .add_option("--optimizer-share", costs.optimizer_share,
                  "what the optimizer has of STATE (default: 12 of the 18 bytes of a parameter with bfloat16 weights, "
                  "float32 gradients, and AdamW with float32 weights)")
      ->needs(shard)
      ->option_text("0.667");
  command.add_option("--replicas", costs.replicas, "pipelines that train one model")
      ->needs(shard)
      ->capture_default_str();
}

std::string sharding_text(const MemoryCosts& memory) {
  if (memory.sharded == 0) return "";
  return detail::str("The optimizer, ", percent(memory.sharded, 1),
                     " of the state, is sharded over the ranks that hold a stage",
                     memory.replicas > 1 ? detail::str(" in ", memory.replicas, " replicas") : "", ".\n");
}

void add_cost_file(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("costs", "print what was measured in a trace as a costs file, to edit or reuse");
  struct CostsOptions {
    std::string file;
    OutputOptions output;
  };
  auto options = std::make_shared<CostsOptions>();
  command.add_option("file", options->file, "trace, or costs file")->required()->option_text("FILE");
  command.footer(
      "A costs file is a JSON object; every key may be absent:\n"
      "  forward, backward, weight, pair, send   durations; pair: a forward with a whole backward\n"
      "  stages       [{forward, backward, weight, memory, parameters, bytes}, ...], one for each stage\n"
      "  pairs        [{forward: STAGE, backward: STAGE, duration}, ...], pairs that take another time\n"
      "  sends        [{boundary: B and/or ranks: [A, B], duration}, ...], transfers that do\n"
      "  slowdown     [factor of rank 0, of rank 1, ...]\n"
      "  pair_ready   {activation, gradient}: when results leave a pair, as fractions of it\n"
      "  memory       {activation, weight, state} of a stage\n"
      "  seconds_per_unit   1 where durations are seconds; 0: in a unit of your own\n"
      "Measured are medians over a trace's steps; of several steps the first, which warms up, does not count.");
  add_output(command, options->output, {});
  command.callback([options] { write_output(to_json(read_cost_file(options->file)), options->output.path); });
}

std::string describe(const Costs& costs, Publish publish) {
  const double unit = costs.seconds_per_unit;
  const auto of_stages = [&](double StageCosts::* member, double even) {
    std::vector<double> durations;
    for (const StageCosts& stage : costs.stages) durations.push_back(stage.*member);
    if (durations.empty()) durations = {even};
    return range(durations, unit);
  };
  std::vector<double> sends{costs.send};
  for (const SendCost& send : costs.sends) sends.push_back(send.duration);
  std::string pair = time(costs.pair, unit);
  if (!costs.stages.empty() && costs.forward + costs.backward > 0)
    pair = detail::str("(F+B)*", costs.pair / (costs.forward + costs.backward));
  std::string text =
      "F=" + of_stages(&StageCosts::forward, costs.forward) + " B=" + of_stages(&StageCosts::backward, costs.backward) +
      " W=" + of_stages(&StageCosts::weight, costs.weight) + " pair=" + pair + " send=" + range(sends, unit);
  for (std::size_t rank = 0; rank < costs.slowdown.size(); ++rank)
    if (costs.slowdown[rank] != 1)
      text += detail::str(", rank ", rank, " takes ", costs.slowdown[rank], " times as long");
  return text + ", results published " + (publish == Publish::early ? "early" : "when a step ends (atomic)");
}

}  // namespace dualpipe::planner::tool
