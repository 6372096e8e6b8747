#include "dualpipe/launch/world.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "dualpipe/error.hpp"
#include "error_of.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using Variables = std::map<std::string, std::string>;

World world_of(const Variables& variables) {
  return World::from([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

std::string error_of(const Variables& variables) {
  return test::error_of([&] { world_of(variables); });
}

Variables with(Variables variables, const Variables& changes) {
  for (const auto& [name, value] : changes) variables[name] = value;
  return variables;
}

const Variables launcher_variables = {{"RANK", "5"},         {"WORLD_SIZE", "8"},
                                      {"LOCAL_RANK", "1"},   {"LOCAL_WORLD_SIZE", "4"},
                                      {"MASTER_ADDR", "n7"}, {"MASTER_PORT", "29500"}};
const Variables slurm_variables = {{"SLURM_PROCID", "5"},
                                   {"SLURM_NTASKS", "8"},
                                   {"SLURM_LOCALID", "1"},
                                   {"SLURM_NTASKS_PER_NODE", "4"},
                                   {"SLURM_JOB_NODELIST", "node[03-07,9]"},
                                   {"SLURM_JOB_ID", "123456"}};

TEST(World, IsOneRankWithoutALauncher) {
  const World world = world_of({});
  EXPECT_EQ(world.rank, 0);
  EXPECT_EQ(world.size, 1);
  EXPECT_EQ(world.local_rank, 0);
  EXPECT_EQ(world.local_size, 1);
  EXPECT_EQ(world.master_port, 0);
  EXPECT_FALSE(world.launcher_hosts_store);
  EXPECT_EQ(world.error_file, "");
}

TEST(World, ReadsTheLaunchersVariables) {
  const World world =
      world_of(with(launcher_variables, {{"DUALPIPE_RUN_ID", "morning"}, {"DUALPIPE_ERROR_FILE", "/run/error.json"}}));
  EXPECT_EQ(world.rank, 5);
  EXPECT_EQ(world.size, 8);
  EXPECT_EQ(world.local_rank, 1);
  EXPECT_EQ(world.local_size, 4);
  EXPECT_EQ(world.master_address, "n7");
  EXPECT_EQ(world.master_port, 29500);
  EXPECT_EQ(world.run_id, "morning");
  EXPECT_EQ(world.error_file, "/run/error.json");
  EXPECT_FALSE(world.launcher_hosts_store);
}

TEST(World, ReadsTorchrunsVariables) {
  const Variables torchrun = with(launcher_variables, {{"TORCHELASTIC_RUN_ID", "job"},
                                                       {"TORCHELASTIC_RESTART_COUNT", "2"},
                                                       {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                                       {"TORCHELASTIC_ERROR_FILE", "/tmp/error.json"},
                                                       {"DUALPIPE_ERROR_FILE", "/of/a/launcher/around/it"}});
  const World world = world_of(torchrun);
  EXPECT_EQ(world.run_id, "job.2");
  EXPECT_TRUE(world.launcher_hosts_store);
  EXPECT_EQ(world.error_file, "/tmp/error.json");
  EXPECT_FALSE(world_of(with(torchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}})).launcher_hosts_store);
}

TEST(World, TakesAllRanksToBeLocalUnlessToldOtherwise) {
  const World alone = world_of({{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"MASTER_PORT", "1"}});
  EXPECT_EQ(alone.local_rank, 3);
  EXPECT_EQ(alone.local_size, 4);
  EXPECT_EQ(alone.master_address, "127.0.0.1");
  const World hosts = world_of({{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_PORT", "1"}});
  EXPECT_EQ(hosts.local_rank, 1);
  EXPECT_EQ(hosts.local_size, 2);
}

TEST(World, OfOneNeedsNoPort) { EXPECT_EQ(world_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).size, 1); }

TEST(World, QuotesWhatIsWrong) {
  EXPECT_THAT(error_of({{"RANK", "0"}}), HasSubstr("WORLD_SIZE is not set although RANK is"));
  EXPECT_THAT(error_of({{"WORLD_SIZE", "2"}}), HasSubstr("RANK is not set although WORLD_SIZE is"));
  EXPECT_THAT(error_of(with(launcher_variables, {{"RANK", "8"}})),
              AllOf(HasSubstr("RANK='8' with WORLD_SIZE='8'"), HasSubstr("0 to 7")));
  EXPECT_THAT(
      error_of({{"RANK", "0"}, {"WORLD_SIZE", "2"}}),
      AllOf(HasSubstr("MASTER_PORT is not set although WORLD_SIZE='2'"), HasSubstr("dualpipe-run or torchrun")));
  EXPECT_THAT(error_of(with(launcher_variables, {{"LOCAL_RANK", "4"}})),
              HasSubstr("LOCAL_RANK='4' with LOCAL_WORLD_SIZE='4'"));
  EXPECT_THAT(error_of(with(launcher_variables, {{"LOCAL_WORLD_SIZE", "9"}})),
              HasSubstr("LOCAL_WORLD_SIZE='9' with WORLD_SIZE='8'"));
  EXPECT_THAT(error_of(with(launcher_variables, {{"MASTER_ADDR", ""}})), HasSubstr("MASTER_ADDR=''"));
  for (const std::string port : {"0", "65536", "-1", "29500 ", "0x10", "", "99999999999999999999"})
    EXPECT_THAT(error_of(with(launcher_variables, {{"MASTER_PORT", port}})), HasSubstr("MASTER_PORT='" + port + "'"));
}

TEST(World, RefusesWhatIsNotAWholeNumber) {
  for (const std::string name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
    for (const std::string value :
         {"", "two", "1.5", "-1", "+1", " 1", "1 ", "1e1", "4294967296", "18446744073709551617"})
      EXPECT_THAT(error_of(with(launcher_variables, {{name, value}})), HasSubstr(name + "='" + value + "'"));
}

TEST(World, ReadsSlurmsVariables) {
  const World world = world_of(slurm_variables);
  EXPECT_EQ(world.rank, 5);
  EXPECT_EQ(world.size, 8);
  EXPECT_EQ(world.local_rank, 1);
  EXPECT_EQ(world.local_size, 4);
  EXPECT_EQ(world.master_address, "node03");
  EXPECT_GE(world.master_port, 1024);
  EXPECT_LT(world.master_port, 32768) << "the system hands out higher ports by itself";
  EXPECT_THAT(world.run_id, HasSubstr("123456"));
}

TEST(World, PrefersALauncherInsideASlurmJob) {
  EXPECT_EQ(world_of(with(slurm_variables, launcher_variables)).master_address, "n7");
}

TEST(World, GivesEverySlurmStepAPortOfItsOwn) {
  const int first = world_of(with(slurm_variables, {{"SLURM_STEP_ID", "0"}})).master_port;
  EXPECT_NE(first, world_of(with(slurm_variables, {{"SLURM_STEP_ID", "1"}})).master_port);
  EXPECT_NE(first, world_of(with(slurm_variables, {{"SLURM_JOB_ID", "123457"}})).master_port);
  EXPECT_EQ(first, world_of(with(slurm_variables, {{"SLURM_PROCID", "0"}})).master_port) << "all ranks must agree";
}

TEST(World, UsesAMasterThatIsNamedUnderSlurm) {
  const World world = world_of(with(slurm_variables, {{"MASTER_ADDR", "head"}, {"MASTER_PORT", "1234"}}));
  EXPECT_EQ(world.master_address, "head");
  EXPECT_EQ(world.master_port, 1234);
}

TEST(World, FindsTheFirstHostOfSlurmsLists) {
  const auto host = [](const std::string& list) {
    return world_of(with(slurm_variables, {{"SLURM_JOB_NODELIST", list}})).master_address;
  };
  EXPECT_EQ(host("login"), "login");
  EXPECT_EQ(host("a1,b2"), "a1");
  EXPECT_EQ(host("node[9,03-07]"), "node9");
  EXPECT_EQ(host("rack[2-3]-node[004-010].local,x"), "rack2-node004.local");
  EXPECT_EQ(world_of(with(slurm_variables, {{"SLURM_STEP_NODELIST", "step[1-2]"}})).master_address, "step1");
  for (const std::string list : {"", ",a", "node[", "node[1-2", "node[]", "node[-2]"})
    EXPECT_THAT(error_of(with(slurm_variables, {{"SLURM_JOB_NODELIST", list}})),
                HasSubstr("SLURM_JOB_NODELIST='" + list + "'"));
}

TEST(World, CountsTheTasksOfASlurmNode) {
  Variables slurm = slurm_variables;
  slurm.erase("SLURM_NTASKS_PER_NODE");
  const auto local_size = [&](const std::string& counts, const std::string& node) {
    return world_of(with(slurm, {{"SLURM_TASKS_PER_NODE", counts}, {"SLURM_NODEID", node}})).local_size;
  };
  EXPECT_EQ(local_size("3", "0"), 3);
  EXPECT_EQ(local_size("4(x2),3", "0"), 4);
  EXPECT_EQ(local_size("4(x2),3", "1"), 4);
  EXPECT_EQ(local_size("4(x2),3", "2"), 3);
  for (const std::string counts : {"", "x", "4(x2", "4(x),3", "4(x1)", "0", ",", "4(x99999999999999999999)"})
    EXPECT_THAT(error_of(with(slurm, {{"SLURM_TASKS_PER_NODE", counts}, {"SLURM_NODEID", "1"}})),
                HasSubstr("SLURM_TASKS_PER_NODE='" + counts + "'"));
}

TEST(World, QuotesWhatIsWrongWithSlurm) {
  EXPECT_THAT(error_of({{"SLURM_PROCID", "0"}}), HasSubstr("SLURM_NTASKS is not set although SLURM_PROCID is"));
  EXPECT_THAT(error_of(with(slurm_variables, {{"SLURM_PROCID", "8"}})),
              HasSubstr("SLURM_PROCID='8' with SLURM_NTASKS='8'"));
  EXPECT_THAT(error_of(with(slurm_variables, {{"SLURM_LOCALID", "x"}})), HasSubstr("SLURM_LOCALID='x'"));
  EXPECT_THAT(error_of(with(slurm_variables, {{"SLURM_JOB_ID", "none"}})),
              AllOf(HasSubstr("SLURM_JOB_ID='none'"), HasSubstr("MASTER_PORT")));
}

// ---- the secret

class WorldSecret : public ::testing::Test {
 protected:
  /// The launcher's variables, with a file of this text as the secret.
  Variables with_secret(const std::string& text, const Variables& launcher = launcher_variables) const {
    const std::string path = folder_.write("secret", text);
    std::filesystem::permissions(path, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
    return with(launcher, {{"DUALPIPE_SECRET_FILE", path}});
  }
  std::string path() const { return (folder_ / "secret").string(); }

  test::TemporaryFolder folder_;
};

TEST_F(WorldSecret, IsReadUnderEveryLauncher) {
  const std::string secret = "sixteen or more!";
  EXPECT_EQ(world_of(launcher_variables).secret, "");
  EXPECT_EQ(world_of(with_secret(secret)).secret, secret);
  EXPECT_EQ(world_of(with_secret(secret + "\n")).secret, secret);
  EXPECT_EQ(world_of(with_secret(secret + "\n\n")).secret, secret + "\n");
  EXPECT_EQ(world_of(with_secret(secret, slurm_variables)).secret, secret);
  EXPECT_EQ(world_of(with_secret(secret, with(launcher_variables, {{"TORCHELASTIC_RUN_ID", "job"}}))).secret, secret);
  EXPECT_EQ(world_of(with_secret(secret, {})).secret, "") << "one rank has nobody to prove it to";
  const std::string longest(4096, 'x');
  EXPECT_EQ(world_of(with_secret(longest + "\n")).secret, longest);
}

TEST_F(WorldSecret, IsReadThroughALinkAsAClusterMountsIt) {
  Variables variables = with_secret("sixteen or more!");
  std::filesystem::create_symlink("secret", folder_ / "link");
  variables["DUALPIPE_SECRET_FILE"] = (folder_ / "link").string();
  EXPECT_EQ(world_of(variables).secret, "sixteen or more!");
}

TEST_F(WorldSecret, HasEnoughBytesAndIsInNoError) {
  const std::string size = "a secret has 16 to 4096 bytes, the file ";
  EXPECT_THAT(error_of(with_secret("fifteen-of-them\n")),
              AllOf(HasSubstr("DUALPIPE_SECRET_FILE='" + path() + "': " + size + "15; make one by: (umask 077; "),
                    Not(HasSubstr("fifteen-of-them"))));
  EXPECT_THAT(error_of(with_secret("")), HasSubstr(size + "0;"));
  EXPECT_THAT(error_of(with_secret(std::string(4097, 'x'))), AllOf(HasSubstr(size + "more;"), Not(HasSubstr("xxxx"))));
  EXPECT_THAT(error_of(with_secret(std::string(100'000, 'x'))), HasSubstr(size + "more;"));
}

TEST_F(WorldSecret, BelongsToItsUserAlone) {
  const Variables variables = with_secret("sixteen or more!");
  for (const int mode : {0644, 0640, 0602, 0610}) {
    ASSERT_EQ(::chmod(path().c_str(), static_cast<mode_t>(mode)), 0);
    EXPECT_THAT(error_of(variables), AllOf(HasSubstr("DUALPIPE_SECRET_FILE='" + path() + "': others than the owner"),
                                           HasSubstr("run chmod 600 " + path())));
  }
  ASSERT_EQ(::chmod(path().c_str(), 0400), 0);
  EXPECT_EQ(world_of(variables).secret, "sixteen or more!");
  if (::geteuid() != 0) return;  // cannot make files of other users
  ASSERT_EQ(::chown(path().c_str(), 53531, 53531), 0);
  EXPECT_THAT(error_of(variables), HasSubstr("the file belongs to user 53531; it must belong to user 0"));
}

TEST_F(WorldSecret, IsInARegularFile) {
  const auto error_with = [&](const std::string& file) {
    return error_of(with(launcher_variables, {{"DUALPIPE_SECRET_FILE", file}}));
  };
  EXPECT_THAT(error_with(path()),
              HasSubstr(path() + "': cannot read the secret of the job: No such file or directory"));
  EXPECT_THAT(error_with(""), HasSubstr("DUALPIPE_SECRET_FILE='': cannot read the secret of the job"));
  EXPECT_THAT(error_with(folder_.path().string()), HasSubstr("not a regular file"));
  ASSERT_EQ(::mkfifo(path().c_str(), 0600), 0);
  EXPECT_THAT(error_with(path()), HasSubstr("not a regular file"));
}

TEST(World, ReadsTheEnvironment) {
  for (const auto& [name, value] : launcher_variables) setenv(name.c_str(), value.c_str(), 1);
  EXPECT_EQ(World::from_env().rank, 5);
  EXPECT_EQ(World::from_env().size, 8);
  for (const auto& [name, value] : launcher_variables) unsetenv(name.c_str());
}

}  // namespace
}  // namespace dualpipe
