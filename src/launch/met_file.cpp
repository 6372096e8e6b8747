#include "launch/met_file.hpp"

#include <fstream>

#include "dualpipe/launch/world.hpp"
#include "launch/environment.hpp"

namespace dualpipe::detail {
namespace {

constexpr int a_meeting = -1;

void append(const std::string& met_file, int number) {
  if (!met_file.empty()) std::ofstream(met_file, std::ios::app) << number << '\n';
}

}  // namespace

std::string met_file(const World& world) {
  return is_launched_as(world) ? variable("DUALPIPE_MET_FILE").value_or("") : "";
}

void note_meeting(const std::string& met_file) { append(met_file, a_meeting); }

void note_met(const std::string& met_file, int rank) { append(met_file, rank); }

Met read_met(const std::string& met_file) {
  Met met;
  std::ifstream in(met_file);
  for (int number = 0; in >> number;) {
    if (number != a_meeting) {
      met.ranks.insert(number);
    } else if (!met.ranks.empty()) {
      met.before = true;
      met.ranks.clear();
    }
  }
  return met;
}

}  // namespace dualpipe::detail
