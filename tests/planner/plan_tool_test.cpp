// dualpipe-plan as a user meets it: a process with arguments, two outputs and an exit code.
#include "plan_tool.hpp"

#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string>

#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/lower.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::StartsWith;

TEST_F(PlanTool, ShowPrintsTheFigure) {
  const Result result = run("show --schedule dualpipe --ranks 8 --microbatches 20");
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.err, "");
  EXPECT_EQ(result.out, read(fs::path(DUALPIPE_GOLDENS) / "plan_show_8x20.txt"));
}

TEST_F(PlanTool, ShowInOtherFormats) {
  const Schedule schedule = make_schedule({"dualpipev", 3, 9});
  const std::string which = "show --schedule dualpipev --ranks 3 --microbatches 9 --format ";
  EXPECT_EQ(output(which + "csv"), to_csv(schedule));
  EXPECT_EQ(output(which + "svg"), to_svg({simulate(schedule).timeline}));
  EXPECT_THAT(output(which + "ascii --color always"), HasSubstr("\x1b["));
  const json shown = json::parse(output(which + "json"));
  EXPECT_EQ(shown["num_stages"], 6);
  EXPECT_EQ(shown["num_micro_batches"], 9);
  EXPECT_EQ(shown["ranks"][0][0], to_string(schedule.ranks[0][0]));
  EXPECT_EQ(shown["ranks"].size(), 3U);
  EXPECT_EQ(output("show --schedule interleaved --ranks 2 --microbatches 4 --chunks 3 --format csv"),
            to_csv(make_schedule({"interleaved", 2, 4, 3})));
}

TEST_F(PlanTool, SimulateGivesTheKnownNumbers) {
  EXPECT_EQ(makespan("--schedule dualpipe --ranks 8 --microbatches 20 --costs 1,2,1,3"), 63);
  EXPECT_EQ(makespan("--schedule dualpipe --ranks 8 --microbatches 20 --costs 1,2,1,3 --publish atomic"), 66);
  EXPECT_NEAR(makespan("--schedule dualpipe --ranks 8 --microbatches 20 --send 0.1"), 64.5, 1e-9);
  EXPECT_NEAR(makespan("--schedule dualpipe --ranks 16 --microbatches 64 --send 0.1 --publish atomic"), 214.1, 1e-9);

  const json result = json_of("simulate --ranks 8 --microbatches 20 --publish atomic");
  ASSERT_EQ(result["ranks"].size(), 8U);
  for (int rank = 0; rank < 8; ++rank)
    EXPECT_EQ(result["ranks"][static_cast<std::size_t>(rank)],
              (json{{"rank", rank}, {"busy", 60.0}, {"bubble", 6.0}, {"peak_activations", 9}}));
  EXPECT_THAT(output("simulate --ranks 8 --microbatches 20"),
              HasSubstr("makespan 63, bubble 3 (4.8 %) on the worst rank"));
  EXPECT_THAT(output("simulate --ranks 8 --microbatches 20 --format svg"), StartsWith("<svg "));
}

TEST_F(PlanTool, LowerPrintsTheProgram) {
  const Program program = lower(make_schedule({"dualpipe", 4, 8}));
  const json printed = json_of("lower --schedule dualpipe --ranks 4 --microbatches 8");
  ASSERT_EQ(printed["order"].size(), program.order.size());
  for (std::size_t i = 0; i < program.order.size(); ++i) {
    const Transfer& transfer = program.order[i];
    EXPECT_EQ(printed["order"][i],
              (json{{"payload", transfer.payload == Payload::activation ? "activation" : "gradient"},
                    {"stage", transfer.stage},
                    {"micro_batch", transfer.micro_batch},
                    {"from", transfer.from},
                    {"to", transfer.to}}));
  }
  ASSERT_EQ(printed["ranks"].size(), 4U);
  const char* names[] = {"receive", "wait", "compute", "send", "release"};
  for (std::size_t rank = 0; rank < 4; ++rank) {
    ASSERT_EQ(printed["ranks"][rank].size(), program.ranks[rank].size());
    for (std::size_t i = 0; i < program.ranks[rank].size(); ++i) {
      const Instruction& instruction = program.ranks[rank][i];
      json expected{{"do", names[static_cast<int>(instruction.what)]}};
      if (instruction.what == Instruction::Do::compute)
        expected["step"] = to_string(instruction.step);
      else
        expected["transfer"] = instruction.transfer;
      EXPECT_EQ(printed["ranks"][rank][i], expected);
    }
  }
  EXPECT_THAT(output("lower --ranks 2 --microbatches 2"),
              HasSubstr("rank 0:\n  compute 0F0\n  send 0  (0F0 from rank 0 to rank 1)\n"));
}

TEST_F(PlanTool, CheckTakesAnyValidSchedule) {
  write("torch.csv", "0F0,,0F1,0B0,,0I1,0W1\r\n,1F0,1B0,1F1,1B1,,\r\n");
  EXPECT_EQ(output("check torch.csv"),
            "valid: torch.csv: 2 ranks, 2 stages, 2 micro-batches, 9 steps, 4 transfers; finishes with one transfer at "
            "a time per rank\n");
  json_of("simulate --schedule torch.csv --ranks 2 --microbatches 2");
  for (const std::string& kind : schedule_kinds()) {
    write("kind.csv", to_csv(make_schedule({kind, 4, 8})));
    EXPECT_EQ(run("check kind.csv").code, 0) << kind;
  }
}

TEST_F(PlanTool, CheckRefusesWithTheFindings) {
  write("cycle.csv", "0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0\n");
  expect_refused("check cycle.csv", 1, "cycle.csv");
  write("incomplete.csv", "0F0,0B0,0F1\n1F0,1B0\n");
  expect_refused("check incomplete.csv", 1, "further findings:\n");
  write("token.csv", "0F0,0X0\n");
  expect_refused("check token.csv", 1, "0X0");
  write("number.csv", "0F99999999999999999999\n");
  expect_refused("check number.csv", 1, "number.csv");
  write("nul.csv", std::string("0F0,0\0B0\n", 9));
  expect_refused("check nul.csv", 1, "nul.csv");
  write("empty.csv", "");
  expect_refused("check empty.csv", 1, "empty.csv");
  expect_refused("check missing.csv", 1, "schedule \"missing.csv\" is neither a kind (dualpipe, ");
  expect_refused("check .", 1, "directory");
  expect_refused("check /dev/zero", 1, "more than");
}

TEST_F(PlanTool, StandardOutputThatCannotBeWrittenIsAFailure) {
  for (const std::string arguments : {"show --schedule 1f1b --ranks 2 --microbatches 4", "--help", "show --help"}) {
    for (const std::string stream : {">/dev/full", ">&-"}) {
      const std::string command = "(" DUALPIPE_PLAN " " + arguments + " " + stream + ")";
      const int status = std::system((command + " 2>" + (folder_ / "stderr").string()).c_str());
      EXPECT_EQ(WEXITSTATUS(status), 1) << command;
      EXPECT_THAT(read(folder_ / "stderr"), testing::StartsWith("dualpipe-plan: cannot write to standard output"));
    }
  }
}

TEST_F(PlanTool, BadInputIsOneAndBadUsageIsTwo) {
  expect_refused("show --schedule dualpipe --ranks 7 --microbatches 20", 1, "even number of ranks, got 7");
  expect_refused("show --schedule zigzag --ranks 8 --microbatches 20", 1, "\"zigzag\"");
  const std::string simulate = "simulate --ranks 8 --microbatches 20 ";
  expect_refused(simulate + "--costs=-1,2,1,3", 1, "forward must be finite and not negative, got -1");
  expect_refused(simulate + "--costs -1,2,1,3", 1, "got -1");
  expect_refused(simulate + "--costs 1,2,1,nan", 1, "pair");
  expect_refused(simulate + "--costs 1,inf,1,3", 1, "backward");
  expect_refused(simulate + "--costs 1,2,3,4", 1, "the backward only 2");
  expect_refused(simulate + "--send -0.5", 1, "send");
  expect_refused(simulate + "--output missing/file", 1, "missing/file");
  expect_refused(simulate + "--output /dev/full", 1, "No space left");
  write("schedule.csv", to_csv(make_schedule({"1f1b", 2, 4})));
  expect_refused("lower --schedule schedule.csv --ranks 3", 1, "has 2 ranks, not 3");
  expect_refused("report schedule.csv", 1, "schedule.csv: not JSON: parse error at line 1, column 2");

  expect_refused("", 2, "subcommand");
  expect_refused("draw", 2, "subcommand");
  expect_refused("show --schedule dualpipe", 2, "needs --ranks and --microbatches");
  expect_refused("show --ranks eight --microbatches 20", 2, "--ranks");
  expect_refused("show --ranks -8 --microbatches 20", 2, "--ranks");
  expect_refused("show --ranks 99999999999 --microbatches 20", 2, "--ranks");
  expect_refused(simulate + "--costs 1,2,1", 2, "--costs");
  expect_refused(simulate + "--costs 1,2,1,3,5", 2, "--costs");
  expect_refused(simulate + "--costs 1,2,x,3", 2, "--costs");
  expect_refused(simulate + "--publish late", 2, "--publish: late not in {early,atomic}");
  expect_refused(simulate + "--format csv", 2, "--format");
  expect_refused(simulate + "--colour", 2, "--colour");
  expect_refused("report", 2, "trace");
}

TEST_F(PlanTool, HelpAndVersion) {
  for (const std::string command : {"", "show ", "check ", "lower ", "simulate ", "report "}) {
    const Result result = run(command + "--help");
    EXPECT_EQ(result.code, 0) << command;
    EXPECT_THAT(result.out, HasSubstr("Usage: dualpipe-plan")) << command;
  }
  EXPECT_THAT(output("--version"), StartsWith("dualpipe-plan "));
}

TEST_F(PlanTool, OutputAppearsWholeAndReportReadsATraceBack) {
  write("trace.json", "what was here before");
  fs::create_symlink("trace.json", folder_ / "link.json");
  const std::string simulate = "simulate --ranks 8 --microbatches 20 --send 0.25 ";
  const Result written = run(simulate + "--format trace --output link.json");
  EXPECT_EQ(written.code, 0) << written.err;
  EXPECT_EQ(written.out, "");
  EXPECT_TRUE(fs::is_symlink(folder_ / "link.json"));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_.path()), fs::directory_iterator()),
            4);  // two, and our two outputs
  const json reported = json_of("report trace.json");
  const json simulated = json_of(simulate);
  EXPECT_EQ(reported["makespan"], simulated["makespan"]);
  for (std::size_t rank = 0; rank < 8; ++rank)
    for (const char* key : {"rank", "busy", "bubble", "peak_activations"})
      EXPECT_EQ(reported["ranks"][rank][key], simulated["ranks"][rank][key]) << key;
  EXPECT_THAT(output("report trace.json"), HasSubstr("hidden"));
  EXPECT_EQ(run("show --ranks 2 --microbatches 4 --output /dev/null").code, 0);
  EXPECT_FALSE(fs::is_regular_file("/dev/null"));
}

TEST_F(PlanTool, OutputDoesNotFollowALinkOfAnotherUser) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can make a link of another user";
  write("precious", "of the user");
  fs::create_symlink("precious", folder_ / "link.svg");
  ASSERT_EQ(::lchown((folder_ / "link.svg").c_str(), 65534, 65534), 0);
  EXPECT_EQ(run("show --ranks 2 --microbatches 4 --format svg --output link.svg").code, 0);
  EXPECT_EQ(read(folder_ / "precious"), "of the user");
  EXPECT_TRUE(fs::is_regular_file(fs::symlink_status(folder_ / "link.svg")));
}

TEST_F(PlanTool, SearchWritesAFasterScheduleThatIsSimulatedAsSaid) {
  const std::string search = "search --ranks 8 --microbatches 20 --send 0.1 --link 3-4:1 --evaluations 3000 ";
  const Result written = run(search + "--format json --output found.csv");
  ASSERT_EQ(written.code, 0) << written.err;
  EXPECT_EQ(written.err, "");  // progress is for terminals
  const json result = json::parse(written.out);
  EXPECT_EQ(result["starts"][0]["order"], "dualpipe");
  EXPECT_NEAR(result["starts"][0]["makespan"], 69.6, 1e-9);
  EXPECT_LT(result["makespan"], 66.0);
  EXPECT_NEAR(result["bound"]["makespan"], 63.3, 1e-9);
  EXPECT_EQ(result["bound"]["rank"], 3);
  EXPECT_EQ(result["limits"], (json{{"activations", 9}, {"weights", 4}, {"memory", nullptr}}));
  EXPECT_EQ(result["evaluations"], 3000);

  EXPECT_EQ(run("check found.csv").code, 0);
  const json simulated = json_of("simulate found.csv --send 0.1 --link 3-4:1");
  EXPECT_NEAR(simulated["makespan"], result["makespan"], 1e-9);
  for (const json& rank : simulated["ranks"]) EXPECT_LE(rank["peak_activations"], 9);

  EXPECT_EQ(output(search + "--format csv"), read(folder_ / "found.csv"));  // the seed decides
  EXPECT_THAT(output(search), HasSubstr("of the distance between dualpipe and the bound removed."));
  EXPECT_THAT(output("search --ranks 8 --microbatches 20 --send 0.1 --stage-scale 0:1.3,-1:1.5"),
              HasSubstr("dualpipe reaches it: no order with this placement is faster."));
  // On: from a file, for costs of half as many stages, with less memory.
  EXPECT_EQ(run("search found.csv --send 0.2 --evaluations 100 --max-activations 6").code, 0);
  EXPECT_EQ(run("search dualpipev --ranks 4 --microbatches 9 --stages 4 --stage-scale 0:1.3 --evaluations 100").code,
            0);
  const json little = json_of("search --ranks 4 --microbatches 8 --memory 2,1,3 --memory-limit 12 --evaluations 500");
  EXPECT_EQ(little["limits"]["memory"], 12.0);

  expect_refused("search --ranks 4 --microbatches 8 --memory 2,1,3 --memory-limit 7", 1, "needs at least 8 of memory");
  expect_refused("search --ranks 4 --microbatches 8 --memory-limit nan", 1, "got nan");
  expect_refused("search --ranks 4 --microbatches 8 --output missing/found.csv", 1, "cannot write missing/found.csv");
  expect_refused("search dualpipev --ranks 4 --microbatches 8 --max-activations 1", 1, "holds 2 activations");
  expect_refused("search --ranks 4", 2, "needs --ranks and --microbatches");
  expect_refused("search --ranks 4 --microbatches 8 --evaluations 0", 2,
                 "--evaluations: must be a positive number, got 0");
  expect_refused("search --ranks 90000 --microbatches 90000", 1, "would not end");
  expect_refused("search --ranks 4 --microbatches 8 --seconds -1", 2, "--seconds: must be a positive number, got -1");
}

}  // namespace
}  // namespace dualpipe::planner
