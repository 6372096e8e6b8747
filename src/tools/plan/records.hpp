#pragma once

#include <string>
#include <vector>

namespace dualpipe::planner::tool {

/// Files, and folders with records: all of these in the order of their ranks.
///
/// @throws InvalidArgument  a folder without a record.
std::vector<std::string> with_records_of_folders(const std::vector<std::string>& paths);

/// Whether a file begins as a record does.
bool is_record(const std::string& path);

/// Which rank was behind, as text or JSON.
///
/// @param incomplete  as in find_straggler.
/// @throws InvalidArgument  with the path where one file is wrong.
std::string report_records(const std::vector<std::string>& paths, bool incomplete, bool as_json);

}  // namespace dualpipe::planner::tool
