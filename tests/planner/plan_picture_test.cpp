// Pictures and reports of dualpipe-plan.
#include <pty.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string>

#include "dualpipe/planner/explain.hpp"
#include "dualpipe/planner/pair_timeline.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/trace.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/simulate.hpp"
#include "plan_tool.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

/// What a terminal shows.
std::string on_terminal(const std::string& environment, const std::string& arguments) {
  const std::string command = environment + " exec " DUALPIPE_PLAN " " + arguments;
  int terminal = -1;
  const pid_t child = ::forkpty(&terminal, nullptr, nullptr, nullptr);
  if (child == 0) {
    ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    ::_exit(127);
  }
  std::string out;
  std::array<char, 4096> part{};
  for (ssize_t size; (size = ::read(terminal, part.data(), part.size())) > 0;)
    out.append(part.data(), static_cast<std::size_t>(size));
  ::close(terminal);
  ::waitpid(child, nullptr, 0);
  return out;
}

TEST_F(PlanTool, ColorsOnATerminalUnlessToldOtherwise) {
  const std::string show = "show --ranks 2 --microbatches 4";
  EXPECT_THAT(on_terminal("unset NO_COLOR;", show), HasSubstr("\x1b[30;48"));
  EXPECT_THAT(on_terminal("NO_COLOR=", show), HasSubstr("\x1b[30;48"));  // empty counts as not set
  EXPECT_THAT(on_terminal("NO_COLOR=1", show), Not(HasSubstr("\x1b")));
  EXPECT_THAT(on_terminal("NO_COLOR=1", show + " --color always"), HasSubstr("\x1b[30;48"));
  EXPECT_THAT(on_terminal("unset NO_COLOR;", show + " --color never"), Not(HasSubstr("\x1b")));
  EXPECT_THAT(output(show), Not(HasSubstr("\x1b")));
}

TEST_F(PlanTool, PlotDrawsRunsByTheNamesOfTheirFiles) {
  write("one.jsonl", "{\"step\":1,\"loss\":2}\n{\"step\":2,\"loss\":1}\n");
  write("two.jsonl", "{\"step\":1,\"loss\":3}\n");
  const std::string svg = output("plot one.jsonl two.jsonl");
  EXPECT_THAT(svg, StartsWith("<svg "));
  EXPECT_THAT(svg, HasSubstr(">one<"));
  EXPECT_THAT(svg, HasSubstr(">two<"));
  EXPECT_EQ(output("plot one.jsonl two.jsonl -o both.svg"), "");
  EXPECT_EQ(read(folder_ / "both.svg"), svg);
  EXPECT_THAT(output("plot one.jsonl ./one.jsonl"), HasSubstr(">./one.jsonl<"));
  write("wrong.jsonl", "{\"step\":1}\n{\"step\":1}\n");
  expect_refused("plot one.jsonl wrong.jsonl", 1, "wrong.jsonl, line 2");
  expect_refused("plot missing.jsonl", 1, "missing.jsonl");
  expect_refused("plot", 2, "run");
}

TEST_F(PlanTool, ExplainMarksTheEightSteps) {
  const Schedule schedule = make_schedule({"dualpipe", 4, 8});
  const std::string show = "show --explain --ranks 4 --microbatches 8 ";
  const std::string text = output(show);
  EXPECT_THAT(text, HasSubstr("\n        1---2---3-----4-"));
  for (const std::string& note : step_notes(schedule)) EXPECT_THAT(text, HasSubstr("\n" + note + "\n"));
  const Timeline timeline = simulate(schedule).timeline;
  EXPECT_EQ(output(show + "--format svg"),
            to_svg({timeline}, {.marks = step_marks(schedule, timeline), .notes = step_notes(schedule)}));
  EXPECT_EQ(run("show --explain --schedule dualpipev --ranks 3 --microbatches 5").code, 0);
  expect_refused("show --explain --schedule 1f1b --ranks 4 --microbatches 8", 1, "'1f1b' is neither");
  expect_refused(show + "--format csv", 2, "--explain");
}

TEST_F(PlanTool, ShowPairPrintsTheOrderAndAPicture) {
  const Result result = run("show --pair attention,dispatch@,MLP,combine@");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(
      result.out,
      "forward:     attention, dispatch@, MLP, combine@\n"
      "backward:    attention, dispatch@, MLP, combine@, last to first\n"
      "order:       combine-B, attention-F, MLP-B, dispatch-F, dispatch-B, MLP-W, MLP-F, attention-B, attention-W, "
      "combine-F\n"
      "as launched: combine-B, attention-F, dispatch-F, MLP-B, dispatch-B, MLP-W, MLP-F, combine-F, attention-B, "
      "attention-W\n"
      "\n"
      "time            0            1            2            3            4            5            6\n"
      "compute         [attention-F].......[MLP-B      ][MLP-W      ][MLP-F      ][attention-B][attention-W]\n"
      "communication   [combine-B         ][dispatch-F       ][dispatch-B        ][combine-F        ].......\n"
      "\n"
      "takes 6.5; one after the other with communication exposed 12: ratio 0.541667. Communication 6, exposed "
      "0.5.\n");
}

TEST_F(PlanTool, ShowPairOfUnequalAndEmptyChains) {
  json pair = json_of("show --pair CXCX --with C");
  EXPECT_EQ(pair["order"], (json{"C0-F", "X1-F", "C0-B", "C0-W", "C2-F", "X3-F"}));
  EXPECT_EQ(pair["forward"], "CXCX");
  EXPECT_EQ(pair["backward"], "C");
  EXPECT_EQ(pair["makespan"], 5.5);
  EXPECT_EQ(pair["sequential"], 7);
  EXPECT_EQ(pair["hidden"].get<double>() + pair["exposed"].get<double>(), 3);
  pair = json_of("show --pair none --with a,b@ --no-weights");
  EXPECT_EQ(pair["launched"], (json{"b-B", "a-B"}));
  pair = json_of("show --pair a=2,b@=1 --with none");
  EXPECT_EQ(pair["launched"], (json{"a-F", "b-F"}));
  EXPECT_EQ(pair["exposed"], 1);
  EXPECT_THAT(output("show --pair a,b@ --format svg"), testing::AllOf(StartsWith("<svg "), HasSubstr(">a-W<")));
  expect_refused("show --pair a,@b", 1, "node \"@b\" of a chain");
  expect_refused("show --pair none", 1, "two empty chains");
  expect_refused("show --pair a --format csv", 2, "no CSV");
  expect_refused("show --with a", 2, "--pair");
  expect_refused("show --pair a --ranks 4", 2, "--ranks");
}

TEST_F(PlanTool, ReportSaysWhereTheTimeWent) {
  // Two steps on two ranks. Rank 0: a pair of 8 that computes 5 and hides 2 of 4 of its communication, then a wait
  // of 2.
  Timeline timeline{.name = "run", .num_ranks = 2, .seconds_per_unit = 1, .intervals = {}};
  for (const double at : {0.0, 20.0}) {
    const auto add = [&](int rank, Lane lane, const char* step, double begin, double end, const char* node = "") {
      timeline.intervals.push_back({rank, lane, parse_step(step), at + begin, at + end, node});
    };
    add(0, Lane::compute, "(0F1;0B0)OVERLAP_F_B", 0, 8);
    add(0, Lane::node, "0F1", 1, 4, "a");
    add(0, Lane::node, "0I0", 6, 8, "a");
    add(0, Lane::collective, "0B0", 0, 2, "x");
    add(0, Lane::collective, "0F1", 3, 5, "x");
    add(0, Lane::compute, "(0F2;0B1)OVERLAP_F_B", 8, 9);
    add(1, Lane::compute, "(1F1;1B0)OVERLAP_F_B", 2, 5);
    add(1, Lane::compute, "(1F2;1B1)OVERLAP_F_B", 5, 10);
    add(1, Lane::receive, "0F1", 1, 3);
  }
  write("run.json", to_trace(timeline));
  const json whole = json_of("report run.json");
  EXPECT_EQ(whole["name"], "run");
  EXPECT_EQ(whole["steps"], 2);
  EXPECT_EQ(whole["seconds_per_unit"], 1);
  EXPECT_EQ(whole["makespan"], 10);
  EXPECT_EQ(whole["ranks"][0], (json{{"rank", 0},
                                     {"busy", 9.0},
                                     {"compute", 6.0},
                                     {"bubble", 2.0},
                                     {"collectives", {{"total", 4.0}, {"hidden", 2.0}, {"exposed", 2.0}}},
                                     {"transfers", {{"total", 0.0}, {"hidden", 0.0}, {"exposed", 0.0}}},
                                     {"peak_activations", 1}}));
  EXPECT_EQ(whole["ranks"][1]["transfers"], (json{{"total", 2.0}, {"hidden", 1.0}, {"exposed", 1.0}}));
  EXPECT_EQ(whole["total"]["compute"], 14);
  EXPECT_EQ(whole["total"]["bubble"], 4);
  const json& main = whole["main"];
  EXPECT_EQ(main["begin"], 2);
  EXPECT_EQ(main["end"], 9);
  EXPECT_EQ(main["makespan"], 7);
  EXPECT_EQ(main["ranks"][0]["collectives"], (json{{"total", 2.0}, {"hidden", 1.0}, {"exposed", 1.0}}));
  EXPECT_EQ(main["ranks"][1]["bubble"], 0);

  const std::string text = output("report run.json");
  EXPECT_THAT(text, StartsWith("run: 2 ranks, medians over 2 steps\n"));
  EXPECT_THAT(text, HasSubstr("main part, where all ranks run pairs, from 2000.00 ms to 9000.00 ms:\n"));
  EXPECT_THAT(text, HasSubstr("6000.00 ms  60.0 %  2000.00 ms  20.0 %  2000.00 ms  20.0 %"));
}

TEST_F(PlanTool, ReportDrawsSeveralTracesOverEachOther) {
  const std::string simulate = "simulate --ranks 4 --microbatches 8 --format trace ";
  run(simulate + "--output predicted.json");
  run(simulate + "--send 0.5 --output measured.json");
  const Result svg = run("report predicted.json measured.json --format svg");
  EXPECT_EQ(svg.code, 0) << svg.err;
  std::size_t panels = 0;
  for (std::size_t at = svg.out.find("makespan"); at != std::string::npos; at = svg.out.find("makespan", at + 1))
    ++panels;
  EXPECT_EQ(panels, 2U);
  EXPECT_THAT(svg.out, testing::AllOf(HasSubstr(">predicted, dualpipe: 4 ranks"), HasSubstr(">measured, dualpipe: 4")));
  EXPECT_EQ(json_of("report predicted.json measured.json").size(), 2U);
  const std::string ascii = output("report measured.json --format ascii --rows 2 --window 4,12");
  EXPECT_THAT(ascii,
              testing::AllOf(StartsWith("time      5         10"), HasSubstr("rank 2"), Not(HasSubstr("rank 1  "))));
  EXPECT_THAT(output("report measured.json --format ascii --lanes"), HasSubstr("rank 0, communication"));
  expect_refused("report measured.json --format ascii --rows 9", 1, "rank 9 cannot be shown");
  expect_refused("report measured.json --format svg --window 90,99", 1, "shows nothing");
  expect_refused("report measured.json --window 90", 2, "--window");
}

}  // namespace
}  // namespace dualpipe::planner
