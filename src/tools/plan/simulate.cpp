#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/jitter.hpp"
#include "dualpipe/planner/memory.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/planner/residency.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/costs.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

using nlohmann::ordered_json;

struct SimulateOptions {
  ScheduleSpec schedule;
  CostOptions costs;
  Publish publish = Publish::early;
  std::optional<double> deviation;
  Jitter jitter;
  OutputOptions output;
};

constexpr double percentiles[] = {5, 50, 95, 99};

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

ordered_json jitter_json(const Jitter& jitter, const std::vector<double>& makespans) {
  ordered_json object{
      {"deviation", jitter.deviation}, {"trials", jitter.trials}, {"seed", jitter.seed}, {"mean", mean(makespans)}};
  for (const double percent : percentiles) object[detail::str("p", percent)] = percentile(makespans, percent);
  return object;
}

std::string jitter_text(const Jitter& jitter, const std::vector<double>& makespans, double seconds_per_unit) {
  std::string text =
      detail::str("with ", 100 * jitter.deviation, " % jitter (log-normal, ", jitter.trials, " trials, seed ",
                  jitter.seed, "): makespan mean ", time(mean(makespans), seconds_per_unit));
  for (const double percent : percentiles)
    text += detail::str(", p", percent, " ", time(percentile(makespans, percent), seconds_per_unit));
  return text + "\n";
}

std::string memory_text(const std::vector<RankMemory>& ranks) {
  const auto most = std::max_element(ranks.begin(), ranks.end(),
                                     [](const RankMemory& a, const RankMemory& b) { return a.peak < b.peak; });
  return detail::str("peak memory ", most->peak, " on rank ", most - ranks.begin(), ", of which ", most->state,
                     " parameters and optimizer; at most ", most->peak_weights, " weight parts wait\n");
}

/// How long kernels of transfers are on the devices, for each way to start them.
struct Residencies {
  Residency posted, both_ready;
};

Residencies residencies(const Schedule& plan, const Costs& costs, Publish publish) {
  const Program program = lower(plan, publish);
  return {residency(plan, program, costs, TransferStart::posted, publish),
          residency(plan, program, costs, TransferStart::both_ready, publish)};
}

ordered_json residency_json(const Residency& residency) {
  ordered_json object{{"makespan", residency.makespan}};
  for (const RankResidency& rank : residency.ranks)
    object["ranks"].push_back({{"resident", rank.resident}, {"moving", rank.moving}});
  return object;
}

std::string residency_text(const Residencies& found) {
  const auto percent = [](double share) { return detail::str(std::round(1000 * share) / 10, " %"); };
  return detail::str("kernels of transfers occupy a device for at most ", percent(found.posted.most_resident()),
                     " of the step where each end starts when it is posted, ",
                     percent(found.both_ready.most_resident()), " where both start together; data move for ",
                     percent(found.posted.most_moving()), "\n");
}

std::string simulate_and_print(const SimulateOptions& options) {
  const Schedule plan = schedule(options.schedule);
  const CostModel model = options.costs.of(plan);
  const double unit = model.time.seconds_per_unit;
  const bool as_json = options.output.format == "json";
  if (options.deviation && !as_json && options.output.format != "text" && !options.output.format.empty())
    throw CLI::ValidationError("--jitter", "tells percentiles: --format text or json");
  const Timeline timeline = simulate(plan, model.time, options.publish).timeline;
  if (options.output.format == "svg") return to_svg({timeline});
  if (options.output.format == "trace") return to_trace(timeline);
  const Report result = report(timeline);
  const std::vector<RankMemory> memories = memory(plan, model.memory);
  // Without collectives in its stages a pair hands both results on at its end, as lower() takes it here.
  const Residencies found = residencies(plan, model.time, options.publish);
  const bool tells_residency = found.posted.most_moving() > 0;
  const bool tells_memory = model.memory != MemoryCosts{};
  Jitter jitter = options.jitter;
  std::vector<double> makespans;
  if (options.deviation) {
    jitter.deviation = *options.deviation;
    makespans = simulate_jitter(plan, model.time, jitter, options.publish);
  }
  if (as_json) {
    ordered_json object = json_of(result);
    if (tells_memory)
      for (const RankMemory& rank : memories)
        object["memory"].push_back({{"state", rank.state}, {"peak", rank.peak}, {"peak_weights", rank.peak_weights}});
    if (ordered_json stages = json_of_stages(plan, model); !stages.is_null()) object["stages"] = std::move(stages);
    if (tells_residency)
      object["residency"] = {{"posted", residency_json(found.posted)},
                             {"both_ready", residency_json(found.both_ready)}};
    if (options.deviation) object["jitter"] = jitter_json(jitter, makespans);
    return dumped(object);
  }
  return describe(plan) + "; " + describe(model.time, options.publish) + "\n" + text(result, unit) +
         (tells_residency ? residency_text(found) : "") + text_of_stages(plan, model) +
         (tells_memory ? sharding_text(model.memory) + memory_text(memories) : "") +
         (options.deviation ? jitter_text(jitter, makespans, unit) : "");
}

}  // namespace

void add_simulate(CLI::App& app) {
  CLI::App& command =
      *app.add_subcommand("simulate", "run a schedule with given costs: makespan, bubble and activations of each rank");
  auto options = std::make_shared<SimulateOptions>();
  add_schedule(command, options->schedule);
  add_output(command, options->output, {"text", "json", "svg", "trace"});
  add_costs(command, options->costs);
  add_memory(command, options->costs);
  add_recompute(command, options->costs);
  add_sharding(command, options->costs);
  add_publish(command, options->publish);
  CLI::Option* jitter = command
                            .add_option("--jitter", options->deviation,
                                        "let every duration vary by a random factor of its own: log-normal, of mean 1 "
                                        "and this standard deviation; tells percentiles of the makespan")
                            ->option_text("0.1");
  command.add_option("--trials", options->jitter.trials, "how often to run with jitter")
      ->capture_default_str()
      ->needs(jitter);
  command.add_option("--seed", options->jitter.seed, "of the jitter")->capture_default_str()->needs(jitter);
  command.callback([options] { write_output(simulate_and_print(*options), options->output.path); });
}

}  // namespace dualpipe::planner::tool
