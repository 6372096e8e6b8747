#include "launch/secret.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <ios>
#include <system_error>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

constexpr std::size_t fewest_secret_bytes = 16, most_secret_bytes = 4096;

class SecretFile {
 public:
  explicit SecretFile(const std::string& path)
      : number_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)) {}  // a pipe would block
  SecretFile(const SecretFile&) = delete;
  SecretFile& operator=(const SecretFile&) = delete;
  ~SecretFile() {
    if (number_ >= 0) ::close(number_);
  }
  int get() const { return number_; }

 private:
  int number_;
};

}  // namespace

std::string read_secret(const std::string& variable, const std::string& path) {
  const std::string name = str(variable, "='", path, "': ");
  const auto reason = [](int error) { return std::generic_category().message(error); };
  const SecretFile file(path);
  DUALPIPE_CHECK(file.get() >= 0, name, "cannot read the secret of the job: ", reason(errno),
                 "; name a file that this user can read, or unset the variable");
  struct stat status{};
  DUALPIPE_CHECK(::fstat(file.get(), &status) == 0, name, "cannot read the secret of the job: ", reason(errno));
  DUALPIPE_CHECK(S_ISREG(status.st_mode), name, "not a regular file; name one that holds the secret of the job");
  DUALPIPE_CHECK(status.st_uid == ::geteuid() || status.st_uid == 0, name, "the file belongs to user ", status.st_uid,
                 "; it must belong to user ", ::geteuid(), ", who runs this process, or to root: make a copy");
  DUALPIPE_CHECK((status.st_mode & 077) == 0, name, "others than the owner may use the file (mode 0", std::oct,
                 status.st_mode & 0777, "); run chmod 600 ", path);

  std::string text(most_secret_bytes + 2, '\0');  // a newline, and a byte that is too many
  std::size_t size = 0;
  while (size < text.size()) {
    const ssize_t count = ::read(file.get(), text.data() + size, text.size() - size);
    if (count < 0 && errno == EINTR) continue;
    DUALPIPE_CHECK(count >= 0, name, "cannot read the secret of the job: ", reason(errno));
    if (count == 0) break;
    size += static_cast<std::size_t>(count);
  }
  text.resize(size);
  if (text.ends_with('\n')) text.pop_back();
  DUALPIPE_CHECK(text.size() >= fewest_secret_bytes && text.size() <= most_secret_bytes, name, "a secret has ",
                 fewest_secret_bytes, " to ", most_secret_bytes, " bytes, the file ",
                 text.size() > most_secret_bytes ? "more" : str(text.size()),
                 "; make one by: (umask 077; openssl rand -hex 32 > ", path, ")");
  return text;
}

}  // namespace dualpipe::detail
