#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/error_text.hpp"

namespace dualpipe::detail {

/// The text of what `body` throws, never empty then; empty if it returns.
template <class Body>
std::string finding_of(const Body& body) {
  try {
    body();
  } catch (...) {
    return current_error_text();
  }
  return "";
}

/// By rank of the communicator: the number among all ranks, as errors name it.
inline std::vector<int> world_ranks(const Communicator& communicator) {
  std::vector<int> numbers;
  for (int rank = 0; rank < communicator.size(); ++rank) numbers.push_back(communicator.world_rank(rank));
  return numbers;
}

/// Collective: every rank's text, by rank. Involves the hosts only, and waits for no device.
inline std::vector<std::string> all_gather_text(Communicator& communicator, const std::string& text) {
  at::Tensor bytes = at::empty({static_cast<std::int64_t>(text.size())}, at::kByte);
  if (!text.empty()) std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  std::vector<std::string> texts;
  for (const at::Tensor& each : communicator.control().all_gather(bytes).take()) {
    DUALPIPE_CHECK(each.scalar_type() == at::kByte, "rank ", communicator.world_rank(static_cast<int>(texts.size())),
                   " has called something else, as step(), while rank ", communicator.world_rank(communicator.rank()),
                   " makes a DualPipe or is within another call; all ranks call the same in the same order");
    texts.emplace_back(static_cast<const char*>(each.const_data_ptr()), each.numel());
  }
  return texts;
}

/// @param findings  by rank; empty: that rank has none.
/// @param numbers   of the ranks, as world_ranks() gives them.
/// @throws InvalidArgument  if there is any: one text where all ranks found the same, else each with its rank.
inline void throw_findings(const std::vector<std::string>& findings, const std::vector<int>& numbers) {
  bool same = true;
  std::string text;
  for (std::size_t rank = 0; rank < findings.size(); ++rank) {
    same = same && findings[rank] == findings[0];
    if (!findings[rank].empty()) text += str(text.empty() ? "" : "\n", "rank ", numbers[rank], ": ", findings[rank]);
  }
  if (!text.empty()) throw InvalidArgument(same ? findings[0] : text);
}

/// Collective: throws on every rank what any rank found wrong. The communicator stays usable.
///
/// @param finding  of this rank; empty: none.
/// @throws InvalidArgument  as throw_findings.
inline void agree_that_fine(Communicator& communicator, const std::string& finding) {
  throw_findings(all_gather_text(communicator, finding), world_ranks(communicator));
}

/// Collective: throws on every rank if not all make the same statement.
///
/// @param what  names it, as in "options".
inline void agree_on(Communicator& communicator, const std::string& what, const std::string& statement) {
  const std::vector<std::string> statements = all_gather_text(communicator, statement);
  for (std::size_t rank = 1; rank < statements.size(); ++rank)
    if (statements[rank] != statements[0])
      throw InvalidArgument(str("ranks disagree about the ", what, ":\n  rank ", communicator.world_rank(0), ": ",
                                statements[0], "\n  rank ", communicator.world_rank(static_cast<int>(rank)), ": ",
                                statements[rank]));
}

}  // namespace dualpipe::detail
