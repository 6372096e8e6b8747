#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "dualpipe/planner/explain.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/costs.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/pair.hpp"
#include "tools/plan/print.hpp"
#include "tools/plan/view.hpp"

namespace dualpipe::planner::tool {
namespace {

struct ShowOptions {
  ScheduleSpec schedule;
  CostOptions costs;
  Publish publish = Publish::early;
  bool explain = false;
  PairOptions pair;
  ViewOptions view;
  OutputOptions output;
};

std::string show(const ShowOptions& options) {
  const Schedule plan = schedule(options.schedule);
  if (options.output.format == "csv") return to_csv(plan);
  if (options.output.format == "json") return json(plan);
  const CostModel model = options.costs.of(plan);
  const Costs& costs = model.time;
  const Timeline timeline = simulate(plan, costs, options.publish).timeline;
  PictureOptions picture = picture_options(options.view, options.output, timeline);
  if (options.explain) {
    picture.marks = step_marks(plan, timeline);
    if (options.view.window.empty() && options.view.rows.empty()) picture.notes = step_notes(plan);
  }
  if (options.output.format == "svg") return to_svg({timeline}, picture);
  return describe(plan) + "; " + describe(costs, options.publish) + "\n" + to_ascii(timeline, picture) +
         summary(report(timeline)) + text_of_stages(plan, model);
}

}  // namespace

void add_show(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "show", "draw a schedule or a pair, or write a schedule as CSV in the text form of torch.distributed.pipelining");
  auto options = std::make_shared<ShowOptions>();
  add_schedule(command, options->schedule);
  add_output(command, options->output, {"ascii", "csv", "svg", "json"});
  add_costs(command, options->costs);
  add_publish(command, options->publish);
  add_view(command, options->view);
  CLI::Option* explain = command.add_flag(
      "--explain", options->explain,
      "mark the eight steps of dualpipe and dualpipev, and tell, unless only a part is shown, what each does");
  CLI::Option* pair =
      command
          .add_option(
              "--pair", options->pair.forward,
              "instead of a schedule: in which order the nodes of a forward and of a backward run. The chain of "
              "the forward, '@' behind what communicates, '=' before a duration: attention,dispatch@,MLP=2,combine@, "
              "or only letters: CXCX; none: a backward alone")
          ->option_text("CHAIN");
  CLI::Option* with = command
                          .add_option("--with", options->pair.backward,
                                      "the chain of the backward (default: that of the forward; none: a forward alone)")
                          ->option_text("CHAIN")
                          ->needs(pair);
  command
      .add_flag("!--no-weights", options->pair.weights, "the backward of the pair leaves its weight parts for later")
      ->needs(pair);
  for (const char* name : {"--schedule", "--ranks", "--microbatches", "--chunks", "--costs", "--publish"})
    pair->excludes(command.get_option(name));
  pair->excludes(explain);
  command.callback([options, pair, with] {
    if (pair->count() > 0 && with->count() == 0) options->pair.backward = options->pair.forward;
    const std::string& format = options->output.format;
    if (pair->count() > 0 && format == "csv") throw CLI::ValidationError("--format csv", "a pair has no CSV form");
    if (options->explain && (format == "csv" || format == "json"))
      throw CLI::ValidationError("--explain", "marks a picture: --format ascii or svg");
    write_output(pair->count() > 0 ? show_pair(options->pair, options->view, options->output) : show(*options),
                 options->output.path);
  });
}

}  // namespace dualpipe::planner::tool
