// What a runner needs of a bundle's manifest.json.
// Not yet run: no Apple device was at hand.

import Foundation

/// A bundle: the folder that an export wrote.
public struct LanguageBundle {
  /// The program.
  public let program: URL
  /// The tokenizer, for `TextRunner`.
  public let tokenizer: URL
  /// What the manifest tells.
  public let manifest: Manifest

  /// Reads the manifest in `folder`, as it was copied into an app.
  ///
  /// - Throws: `RunnerError.damaged` where a field is missing or wrong, `DecodingError` and errors
  ///   of files otherwise.
  public init(folder: URL) throws {
    program = folder.appendingPathComponent("model.pte")
    tokenizer = folder.appendingPathComponent("tokenizer.json")
    let data = try Data(contentsOf: folder.appendingPathComponent("manifest.json"))
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    manifest = try decoder.decode(Manifest.self, from: data)
    try manifest.check()
  }
}

/// The fields of a manifest that tell how a program is fed.
public struct Manifest: Decodable {
  /// The program.
  public struct Program: Decodable {
    /// A method that reads tokens.
    public struct Method: Decodable {
      /// Lengths of a call, ascending.
      public let seqLengths: [Int]
    }

    /// What the program gives ExecuTorch's runners.
    public struct Constants: Decodable {
      public let getVocabSize: Int
      public let getMaxContextLen: Int
      public let getEosIds: [Int64]?
    }

    public let sha256: String
    public let form: String?
    public let methods: [String: Method]
    public let constantMethods: Constants
  }

  /// What the program is made for.
  public struct Target: Decodable {
    public let backend: String
  }

  public let program: Program
  public let target: Target

  /// Positions that the program remembers.
  public var context: Int { program.constantMethods.getMaxContextLen }
  /// Width of a row of logits.
  public var vocabulary: Int { program.constantMethods.getVocabSize }
  /// Tokens that end a text.
  public var stopTokens: Set<Int64> { Set(program.constantMethods.getEosIds ?? []) }

  /// Lengths between the first and the last are taken, too.
  var ranged: Bool { program.form == "range" }

  /// The only method that reads tokens, with its lengths.
  var method: (name: String, lengths: [Int]) {
    let only = program.methods.first!
    return (only.key, only.value.seqLengths.sorted())
  }

  func check() throws {
    guard context > 0, vocabulary > 0 else { throw RunnerError.damaged("its constant methods") }
    // Methods that hand a cache to each other are fed by the runner in C++.
    guard program.methods.count == 1 else { throw RunnerError.damaged("the number of its methods") }
    guard let least = method.lengths.first, least > 0 else {
      throw RunnerError.damaged("its lengths, of which there are none")
    }
  }
}

/// Why a runner ends before its time.
public enum RunnerError: Error {
  /// What of the bundle is wrong.
  case damaged(String)
  /// A token outside the vocabulary.
  case unknownToken(Int64)
  /// More tokens than there is room for.
  case tooLong(tokens: Int, context: Int)
  /// No tokens at all.
  case emptyPrompt
}
